"""Check the data of a config, and draw what the network will see, before a run costs anything.

python scripts/check_data.py --base configs/own/folder.yaml data.params.train.params.root=PHOTOS
python scripts/check_data.py --base configs/ldm/txt2img.yaml --num 0 --outdir outputs/check_data
"""

from ldm.cli.check_data import main

if __name__ == "__main__":
    main()

"""Draw images from the nearest neighbours of a text or an image: the same as `ldm knn2img`; --help says how."""

import sys

from ldm.training.interrupt import quiet_at_ctrl_c

with quiet_at_ctrl_c():
    from ldm.cli.knn2img import main

if __name__ == "__main__":
    sys.exit(main())

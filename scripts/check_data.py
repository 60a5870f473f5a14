"""Check the data of a config: the same as `ldm doctor data`; --help says how."""

import sys

from ldm.training.interrupt import quiet_at_ctrl_c

with quiet_at_ctrl_c():
    from ldm.cli import doctor


def main() -> int:
    """Examine the data."""
    return doctor.main(["data", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())

"""``python -m nbdserve``: the same program as the ``nbdserve`` command."""

from __future__ import annotations

from nbdserve.cli.main import main

if __name__ == "__main__":
    main()

"""Take the README's picture of a report page with headless Chromium.

python scripts/screenshot.py demo-run/report.html docs/report.png [--height 1500]
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

FLAGS = """--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking
--disable-component-update --disable-sync --hide-scrollbars --virtual-time-budget=8000""".split()


def main() -> None:
    """Take the picture."""
    parser = argparse.ArgumentParser()
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=1300)
    parser.add_argument("--height", type=int, default=1500)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as profile:
        command = ["chromium", *FLAGS, f"--user-data-dir={profile}"]
        command += [f"--window-size={options.width},{options.height}", f"--screenshot={options.picture}"]
        subprocess.run([*command, options.page.resolve().as_uri()], check=True, capture_output=True)


if __name__ == "__main__":
    main()

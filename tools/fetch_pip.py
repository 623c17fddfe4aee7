"""fetch_pip.py DIR: puts pip's newest wheel into DIR and prints its path.

For a Python without ensurepip and a user who may not install packages (tools/venv.sh).  Reads
the index's simple page (PEP 503), which carries each file's SHA-256; the wheel is checked
against it.  Only the standard library: there is nothing else yet.  PIP_INDEX_URL is honoured,
as pip will honour it a moment later.
"""

import hashlib
import html
import os
import pathlib
import re
import sys
import urllib.parse
import urllib.request

INDEX = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/")
# Final releases only: digits and dots.  A yanked file carries data-yanked.
WHEEL = re.compile(
    r'<a (?![^>]*data-yanked)[^>]*href="([^"#]+/(pip-([\d.]+)-py3-none-any\.whl))'
    r'#sha256=([0-9a-f]{64})"'
)


def main(folder: str) -> int:
    page_url = f"{INDEX}/pip/"
    try:
        with urllib.request.urlopen(page_url, timeout=60) as page:
            links = WHEEL.findall(page.read().decode())
        if not links:
            print(f"{page_url}: no wheel of pip with a SHA-256 there", file=sys.stderr)
            return 1
        link, name, _, digest = max(links, key=lambda link: version_key(link[2]))
        url = urllib.parse.urljoin(page_url, html.unescape(link))
        with urllib.request.urlopen(url, timeout=60) as answer:
            wheel = answer.read()
    except OSError as error:
        print(f"{page_url}: {error}", file=sys.stderr)
        return 1
    if hashlib.sha256(wheel).hexdigest() != digest:
        print(f"{url}: not the file the index describes (SHA-256 differs)", file=sys.stderr)
        return 1
    path = pathlib.Path(folder, name)
    path.write_bytes(wheel)
    print(path)
    return 0


def version_key(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

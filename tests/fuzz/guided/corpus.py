"""The kept inputs of the targets, in C and in Python: one text file each, in the repository."""

from __future__ import annotations

import base64
import io
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "tests/fuzz/corpus"
MOST_BYTES = 60_000  # of a target's inputs: the short ones are kept


def kept(name: str) -> list[bytes]:
    """A target's corpus."""
    path = FOLDER / f"{name}.zip.b64"
    if not path.exists():
        return []
    with zipfile.ZipFile(io.BytesIO(base64.decodebytes(path.read_bytes()))) as archive:
        return [archive.read(entry) for entry in sorted(archive.namelist())]


def keep(name: str, inputs: Sequence[bytes], compressed: int = 0) -> None:
    """Make these the target's corpus.

    :param compressed: how many bytes of compressed inputs to keep; 0: MOST_BYTES as they are.
    """
    packed = io.BytesIO()
    total = 0
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for number, data in enumerate(sorted(inputs, key=lambda data: (len(data), data))):
            # An archive has about 100 bytes more for each.
            total += len(zlib.compress(data, 9)) + 100 if compressed else len(data)
            if total > (compressed or MOST_BYTES):
                break
            archive.writestr(zipfile.ZipInfo(f"{number:04}"), data, zipfile.ZIP_DEFLATED, 9)
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.zip.b64").write_bytes(base64.encodebytes(packed.getvalue()))


def report(name: str, status: int, log: Path) -> None:
    """Print a line on a search that has ended."""
    lines = log.read_text(errors="replace").splitlines()
    told = [line for line in lines if "number_of_executed" in line or "cov:" in line][-2:]
    print(f"fuzz {name}: {'found something, see' if status else 'clean;'} "
          f"{log if status else ' '.join(told)}", flush=True)

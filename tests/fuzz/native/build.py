"""Builds the fuzz targets in C, makes honest inputs to start from, and runs them.

    python -m tests.fuzz.native.build [--seconds N] [--keep]

With clang: coverage-guided (libFuzzer) with ASAN and UBSAN, from `tests/fuzz/corpus/rings.zip.b64`
and the honest inputs; with `--keep` what it found is reduced to what adds coverage and put there.
"""

from __future__ import annotations

import base64
import io
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
CORPUS = ROOT / "tests/fuzz/corpus/rings.zip.b64"
SANITIZE = ["-g", "-O1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined"]
FLAGS = ["-std=gnu11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Wno-unused-parameter",
         "-Wno-missing-field-initializers", f"-I{ROOT}/native"]
MAX_LENGTH = 4096
NEXT, WRITE, INDIRECT = 1, 2, 4


def sources() -> list[str]:
    """The target and what it drives."""
    native = ROOT / "native"
    found = [*sorted((native / "virtq").glob("*.c")), *sorted((native / "blk").glob("*.c")),
             native / "uring/io.c"]
    return [str(HERE / "rings.c"), *map(str, found)]


def build(folder: Path, guided: bool) -> Path:
    """The program: libFuzzer's (clang), or one that runs the files that it is given (gcc).

    :raises subprocess.CalledProcessError: it does not compile.
    """
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / ("rings-fuzzer" if guided else "rings-runner")
    if guided:
        command = ["clang", *FLAGS, *SANITIZE, "-fsanitize=fuzzer,address,undefined"]
    else:
        command = ["gcc", *FLAGS, *SANITIZE, "-fsanitize=address,undefined",
                   str(HERE / "main.c")]
    subprocess.run([*command, *sources(), "-o", str(program), "-lpthread"], check=True)
    return program


def honest(type_: int, flags: int, more: int, indirect: bool = False, sector: int = 3,
           size: int = 1024, payload: bytes = b"", tape: bytes = b"") -> bytes:
    """One request of an honest driver, as an input (see rings.c for the layout)."""
    memory = bytearray(0x800)
    writable = not payload and type_ != 1
    size = len(payload) or size
    memory[0x400:0x410] = struct.pack("<IIQ", type_, 0, sector)
    memory[0x600:0x600 + len(payload)] = payload
    rows = [(0x400, 16, NEXT, 1), (0x600, size, NEXT | (WRITE if writable else 0), 2),
            (0x500, 1, WRITE, 0)]
    if size == 0:
        rows = [(0x400, 16, NEXT, 1), (0x500, 1, WRITE, 0)]
    table = b"".join(struct.pack("<QIHH", *row) for row in rows)
    if indirect:
        memory[0x300:0x300 + len(table)] = table
        table = struct.pack("<QIHH", 0x300, len(table), INDIRECT, 0)
    memory[:len(table)] = table
    memory[0x100:0x108] = struct.pack("<HHHH", 0, 1, 0, 0)
    return bytes([flags, more]) + bytes(memory) + tape


def seeds() -> list[bytes]:
    """Honest inputs: each request by each way that it can take."""
    ranges = struct.pack("<QII", 8, 4, 0) + struct.pack("<QII", 40, 3, 1)
    found = []
    # Read from its end: base 0, one round of up to 8 requests.
    tape = bytes(16)
    for flags in (0, 3, 4, 8, 8 | 16, 32, 64, 64 | 32 | 8 | 16, 128, 128 | 8):
        for more in (0, 1, 2, 4, 8, 16):
            for type_, size, payload in ((0, 1024, b""), (1, 1024, b""), (1, 0, b"x" * 512),
                                         (4, 0, b""), (8, 20, b""), (11, 0, ranges[:16]),
                                         (13, 0, ranges)):
                indirect = bool(flags & 2)
                found.append(honest(type_, flags, more, indirect, size=size, payload=payload,
                                    tape=tape))
    return found


def kept() -> list[bytes]:
    """The corpus of the repository."""
    if not CORPUS.exists():
        return []
    with zipfile.ZipFile(io.BytesIO(base64.decodebytes(CORPUS.read_bytes()))) as archive:
        return [archive.read(name) for name in sorted(archive.namelist())]


def keep(folder: Path) -> None:
    """Make the inputs in `folder` the corpus of the repository."""
    CORPUS.parent.mkdir(exist_ok=True)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for number, path in enumerate(sorted(folder.iterdir())):
            archive.writestr(zipfile.ZipInfo(f"{number:04}"), path.read_bytes(),
                             zipfile.ZIP_DEFLATED, 9)
    CORPUS.write_bytes(base64.encodebytes(packed.getvalue()))


def fuzz(seconds: int, keeping: bool) -> int:
    """The exit code of libFuzzer: 0 if nothing was found."""
    work = ROOT / "build/fuzz"
    program = build(work, guided=True)
    corpus = work / "corpus"
    corpus.mkdir(exist_ok=True)
    for number, seed in enumerate(seeds() + kept()):
        (corpus / f"seed-{number}").write_bytes(seed)
    status = subprocess.run(
        [str(program), f"-max_total_time={seconds}", f"-max_len={MAX_LENGTH}", "-timeout=10",
         "-print_final_stats=1", f"-artifact_prefix={work}/", str(corpus)],
        check=False, preexec_fn=lambda: os.nice(19)).returncode  # type: ignore[arg-type,func-returns-value]
    if keeping and not status:
        reduced = work / "reduced"
        shutil.rmtree(reduced, ignore_errors=True)
        reduced.mkdir()
        subprocess.run([str(program), "-merge=1", f"-max_len={MAX_LENGTH}", str(reduced),
                        str(corpus)], check=True)
        keep(reduced)
    return status


def main(arguments: list[str]) -> int:
    """See the module's text."""
    seconds = 60
    if "--seconds" in arguments:
        seconds = int(arguments[arguments.index("--seconds") + 1])
    return fuzz(seconds, "--keep" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

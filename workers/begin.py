"""The script that a nursery executes: `python -I -S workers/begin.py PATH...`.

The paths are where modules are found, beside the interpreter's own.  Should the import fail,
the channel is all there is to say so: the bytes before the text are CBOR for a map of one entry,
"error".
"""

import sys

sys.path[:0] = [path for path in sys.argv[1:] if path not in sys.path]
try:
    from _frozen_importlib_external import MAGIC_NUMBER
    from marshal import loads
    from posix import O_CLOEXEC, close, open, read, stat

    root = sys.argv[1]
    path = f"{root}/workers/__pycache__/startup.{sys.implementation.cache_tag}"
    file = open(path, O_CLOEXEC)
    data = memoryview(read(file, stat(path).st_size))
    close(file)
    if data[:4] == MAGIC_NUMBER:
        exec(loads(data[12:]), {"data": data, "root": root})
    del data
except (OSError, EOFError, ValueError, TypeError):
    pass  # no bundle (native/bundle.py): modules come one by one
try:
    from workers.nursery import main
except BaseException as error:
    import os

    text = repr(error).encode()[:500]
    os.write(3, b"\xa1\x65error\x79" + len(text).to_bytes(2, "big") + text)
    os._exit(1)
main()

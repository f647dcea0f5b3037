"""How a nursery begins: run by the launcher, or as the script `python -I -S begin.py PATH...`.

The paths are where modules are found, beside the interpreter's own.  Should an import fail,
the channel is all there is to say so: the bytes before the text are CBOR for a map of one entry,
"error".
"""

import gc
import sys


def load_bundle(root: str) -> None:
    """Have modules come from one file, if there is one (native/bundle.py), else one by one."""
    try:
        from _frozen_importlib_external import MAGIC_NUMBER
        from marshal import loads
        from posix import O_CLOEXEC, close, open, read, stat

        path = f"{root}/workers/__pycache__/startup.{sys.implementation.cache_tag}"
        file = open(path, O_CLOEXEC)
        data = memoryview(read(file, stat(path).st_size))
        close(file)
        if data[:4] == MAGIC_NUMBER:
            exec(loads(data[12:]), {"data": data, "root": root})
    except (OSError, EOFError, ValueError, TypeError):
        pass


def run(gate: str = "") -> None:
    """Be a nursery, for good.

    :param gate: the number of a descriptor: go on when its other end is closed, by the core or
        its end; empty: at once.
    """
    try:
        if gate:
            from posix import close, read

            read(int(gate), 1)
            close(int(gate))
        from workers.nursery import main
    except BaseException as error:
        import os

        text = repr(error).encode()[:500]
        os.write(3, b"\xa1\x65error\x79" + len(text).to_bytes(2, "big") + text)
        os._exit(1)
    main()


if __name__ == "__main__":
    gc.disable()  # until there is a worker: what a start makes stays
    sys.path[:0] = [path for path in sys.argv[1:] if path not in sys.path]
    load_bundle(sys.argv[1])
    run()

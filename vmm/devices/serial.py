"""The glue between the native 16550A and its character device, on the main loop."""

from __future__ import annotations

from vmm.event_loop import READ

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from vmm.chardev.base import Chardev
    from vmm.event_loop import EventLoop
    from vmm.hypervisor.interface import Uart

CHUNK = 4096


class Serial:
    """Moves bytes both ways; each side's fullness holds up the other."""

    def __init__(self, uart: Uart, chardev: Chardev, loop: EventLoop) -> None:
        self._uart = uart
        self._chardev = chardev
        self._loop = loop
        self._pending = b""  # taken from the UART, not taken by the chardev
        self._watching = True
        chardev.on_input = uart.put_input
        chardev.on_writable = self._flush
        loop.add(uart.output_fd, READ, self._output_ready)

    def _output_ready(self, events: int) -> None:
        # The descriptor also says that there is room for input again.
        self._chardev.resume_input()
        self._flush()

    def _flush(self) -> None:
        """Move output until there is none, or the chardev is full."""
        for _ in range(64):
            if not self._pending:
                self._pending = self._uart.take_output(CHUNK)
                if not self._pending:
                    break
            self._pending = self._pending[self._chardev.write(self._pending):]
            if self._pending:
                # Not to be woken again before the chardev has room: `on_writable` flushes.
                if self._watching:
                    self._loop.remove(self._uart.output_fd)
                    self._watching = False
                return
        if not self._watching:
            self._loop.add(self._uart.output_fd, READ, self._output_ready)
            self._watching = True

    def close(self) -> None:
        """Send what the guest wrote last, as far as it can be sent at once; let go."""
        self._flush()
        self._loop.remove(self._uart.output_fd)
        self._chardev.on_input = None
        self._chardev.on_writable = None

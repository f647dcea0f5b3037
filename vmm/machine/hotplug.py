"""Disks and NICs come and go while the VM lives: into the slots of a microVM, and out of them.

One thing happens at a time (`_queue`), whoever asked for it; what waits does so off the main
loop.  A slot's device never goes: its back end is replaced (vmm/devices/vhost_user.py), its
config space changes, the guest gets an interrupt.
"""

from __future__ import annotations

import os
import time

from shared import log
from shared.errors import StratovirtError
from vmm.errors import BackendError, ConfigError, DeviceError, StateError
from vmm.event_loop import READ
from vmm.machine.machine import Device

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from vmm.devices.vhost_user import VhostUserDevice
    from vmm.machine.family import Family, Node
    from vmm.machine.machine import Machine
    from vmm.machine.slots import Slot
    from vmm.vm import Vm
    from vmm.worker.null import NullBackend
    from vmm.worker.process import WorkerProcess
    from vmm.worker.supervisor import Kind

    Done = Callable[[Exception | None], None]

# Seconds for a worker to come up, for a slot's rings to drain.
PLUG_LIMIT = 10.0
DRAIN_LIMIT = 10.0
# ... for the I/O of a worker that had to be killed to end.
DEAD_LIMIT = 20.0
# ... for the replacement of a worker that is under way.
RELEASE_LIMIT = 15.0
RELEASE_POLL = 0.01
# ... for a process that was killed to be gone, and its descriptors with it.
FREE_LIMIT = 10.0
FREE_POLL = 0.001
MAX_NODES = 64


class Hotplug:
    """Plugging and unplugging on one VM; made when the first one is asked for. Main loop only;
    every `done(error)` is called there."""

    def __init__(self, vm: Vm, machine: Machine, null: NullBackend) -> None:
        self._vm = vm
        self._machine = machine
        self._null = null
        self._queue: list[tuple[Callable[[Done], None], Done]] = []
        self._awaited: dict[int, list[int]] = {}  # what is watched of each empty slot

    # ---- one at a time ---------------------------------------------------------------------

    def take_turn(self, action: Callable[[Done], None], done: Done) -> None:
        """Have `action(finish)` run when nothing else happens to a slot; then `done(error)`."""
        self._queue.append((action, done))
        if len(self._queue) == 1:
            self._run_next()

    def _run_next(self) -> None:
        action, done = self._queue[0]

        def finish(error: Exception | None) -> None:
            try:
                done(error)  # what this leads to (a client's next command) queues up
            finally:
                self._queue.pop(0)
                if self._queue:
                    self._run_next()

        try:
            if self._vm.run_state not in ("prelaunch", "running", "paused"):
                raise StateError(f"The VM is {self._vm.run_state}", "it can't be changed now")
            action(finish)
        except StratovirtError as error:
            finish(error)

    # ---- back ends -------------------------------------------------------------------------

    def add_node(self, family: Family, config: Any, done: Done) -> None:
        """`blockdev-add`, `netdev_add`: open what a back end stands for."""
        self.take_turn(lambda finish: self._add_node(family, config, finish), done)

    def _add_node(self, family: Family, config: Any, done: Done) -> None:
        nodes = family.nodes(self._machine)
        if config.id in nodes:
            raise ConfigError(f"{config.id} is already registered.",
                              "choose another id, or remove that one")
        if len(nodes) >= MAX_NODES:
            raise ConfigError(f"There are {MAX_NODES} {family.name} back ends already",
                              f"remove one: {family.remove}")
        others = dict(nodes)
        opened: list[Node] = []

        def finish(error: Exception | None) -> None:
            if error is None:
                nodes[config.id] = opened[0]
            done(error)

        self._vm.off_loop(lambda: opened.append(family.open(config, others)), finish)

    def delete_node(self, family: Family, name: str, done: Done) -> None:
        """`blockdev-del`, `netdev_del`: close a back end that no device uses."""
        self.take_turn(lambda finish: self._delete_node(family, name, finish), done)

    def _delete_node(self, family: Family, name: str, done: Done) -> None:
        nodes = family.nodes(self._machine)
        node = nodes.get(name)
        if node is None:
            raise ConfigError(f"{family.backend.capitalize()} {name} not found",
                              f"only what {family.add} has added can be removed")
        if node.device_id is not None:
            raise ConfigError(f"{family.backend.capitalize()} {name} is in use by the device "
                              f"'{node.device_id}'", "remove the device first: device_del")

        def close() -> None:
            node.close()
            del nodes[name]
            done(None)

        self.when_free(node, close)

    def when_free(self, node: Node, then: Callable[[], object],
                  deadline: float | None = None) -> None:
        """Call `then` when those who end and still have what `node` has open are gone: whoever
        is told by `then` that it is free can open it again. Main loop, in a turn."""
        if deadline is None:
            deadline = time.monotonic() + FREE_LIMIT
        if not node.is_busy() or time.monotonic() > deadline:
            then()
        else:
            self._vm.loop.call_later(FREE_POLL, lambda: self.when_free(node, then, deadline))

    # ---- plugging --------------------------------------------------------------------------

    def add_device(self, family: Family, name: str, driver: str, index: int, backend: str,
                   options: Mapping[str, str], done: Done) -> None:
        """`device_add`: a worker serves the back end `backend` in slot `index` of the family."""
        self.take_turn(lambda finish: self._add_device(family, name, driver, index, backend,
                                                       options, finish), done)

    def _add_device(self, family: Family, name: str, driver: str, index: int, backend: str,
                    options: Mapping[str, str], done: Done) -> None:
        node = family.nodes(self._machine).get(backend)
        if node is None:
            raise family.not_found(backend)
        if not 0 <= index < family.count:
            raise DeviceError(f"A maximum of {family.name} {family.count} replaceable devices are "
                              f"supported: there is no slot {index}",
                              f"use 0 to {family.count - 1}")
        if name in self._machine.devices:
            raise DeviceError(f"The device '{name}' exists already", "choose another id")
        if node.device_id is not None:
            raise DeviceError(f"The {family.backend} '{backend}' already serves the device "
                              f"'{node.device_id}'",
                              f"give each device its own {family.backend}")
        slot = self._machine.slots[family.first + index]
        if slot.occupant is not None:
            raise DeviceError(f"The slot {index} is occupied already by '{slot.occupant.id}'.",
                              "choose another one, or remove that device")
        kind = family.workers(self._vm.nursery(), node, name, slot.device, options)
        node.device_id = name
        slot.vhost.rename(name)
        self._plug(slot, family, node, Device(name, driver, slot.number, slot.device,
                                              slot.transport, None, kind), options, done)

    def _plug(self, slot: Slot, family: Family, node: Node, device: Device,
              options: Mapping[str, str], done: Done) -> None:
        kind = device.kind
        assert kind is not None

        def failed(error: Exception, worker: WorkerProcess | None = None) -> None:
            def finish(_: Exception | None) -> None:
                node.device_id = None
                slot.vhost.rename(slot.empty_name)
                self._vm.nursery().pages.drop(device.id)
                done(error)

            if worker is None:
                finish(None)
            else:
                self._undo(slot, worker, kind, finish)

        def spawn(error: Exception | None) -> None:
            if error is not None:
                failed(error)
                return
            try:
                worker = kind.spawn(opened[0])
            except StratovirtError as caught:
                failed(caught)
                return
            self._vm.off_loop(lambda: self._connect(slot, worker),
                              lambda error: connected(error, worker))

        def connected(error: Exception | None, worker: WorkerProcess) -> None:
            if error is not None:
                if worker.reason not in str(error):
                    error = DeviceError(f"{error}; its worker ended: {worker.reason}")
                failed(error, worker)
                return
            self._forget_kicks(slot)
            self._null.release(slot.vhost)
            device.worker = worker
            slot.occupant = device
            self._machine.devices[device.id] = device
            self._vm.supervisor.watch(device)
            family.warn(device.id, slot.device, node, options)
            self._show(slot, lambda: family.show(slot.device, node, options), done)

        opened: list[Any] = []
        drained = family.is_drained(node)
        self._vm.off_loop(lambda: opened.append(kind.open(drained, PLUG_LIMIT)), spawn)

    @staticmethod
    def _connect(slot: Slot, worker: WorkerProcess) -> None:
        deadline = time.monotonic() + PLUG_LIMIT
        if not worker.wait_started(deadline):
            raise DeviceError(f"{slot.device.id}: failed to update config: the worker did not "
                              "start", worker.reason or "look at the log")
        slot.vhost.replace_backend(worker.take_socket(), deadline, drain=True, harmless=True)

    def _undo(self, slot: Slot, worker: WorkerProcess, kind: Kind, done: Done) -> None:
        """End a worker that could not take over, or not completely."""
        worker.discard()
        if not slot.vhost.is_without_backend():
            done(None)  # the null back end serves on
            return
        # It may have taken requests before it failed.
        self._vm.off_loop(lambda: kind.discard(kind.open(False, DEAD_LIMIT)),
                          lambda _: self._back_to_null(slot.vhost, done))

    def _show(self, slot: Slot, change: Callable[[], None], done: Done) -> None:
        """Change what the config space says, and tell the guest."""
        def work() -> None:
            change()
            slot.vhost.prefetch_config()

        def finish(error: Exception | None) -> None:
            if error is not None:  # the supervisor deals with it; the driver will ask again
                log.warning(str(error))
            slot.device.on_config_change()
            done(None)

        self._vm.off_loop(work, finish)

    # ---- unplugging ------------------------------------------------------------------------

    def delete_device(self, name: str, done: Done) -> None:
        """`device_del`: drain, let the null back end take over, end the worker, close the image.

        DEVICE_DELETED just before `done`.
        """
        self.take_turn(lambda finish: self._delete_device(name, finish), done)

    def _delete_device(self, name: str, done: Done) -> None:
        device = self._machine.devices.get(name)
        slot = next((s for s in self._machine.slots if s.occupant is device), None)
        if device is None or slot is None:
            raise DeviceError(f"Device {name} not found", "query-workers lists the devices")
        if slot.family is None:
            raise DeviceError(f"Device {name} can't be unplugged", "disks and NICs alone can")
        if not slot.replaceable or device.worker is None:
            raise DeviceError(f"Device {name} can't be unplugged: its back end is not ours",
                              "end that back end, the guest then sees that the device failed")

        def released(error: Exception | None) -> None:
            if error is not None:
                done(error)
                return
            assert device.worker is not None
            device.worker.stopping = True  # it ends with its connection, nobody need be told
            try:
                self._replace_by_null(slot, drained)
            except StratovirtError as caught:  # no null worker: the device stays
                device.worker.stopping = False
                self._vm.supervisor.watch(device)
                done(caught)

        def drained(error: Exception | None) -> None:
            if error is None:
                self._gone(slot, device, done, drained=True)
            else:
                log.warning(f"Device {name} is unplugged from a worker that hangs or has died: "
                            f"{error}")
                self._evict(slot, device, done)

        self._release(device, time.monotonic() + RELEASE_LIMIT, released)

    def _release(self, device: Device, deadline: float, done: Done) -> None:
        """Wait until the supervisor lets go of the device: its worker may be being replaced."""
        if self._vm.supervisor.release(device):
            done(None)
        elif time.monotonic() > deadline:
            done(StateError(f"The worker of {device.id} is being replaced, which takes long",
                            "try again soon; query-workers shows when it serves"))
        else:
            self._vm.loop.call_later(RELEASE_POLL, lambda: self._release(device, deadline, done))

    def _replace_by_null(self, slot: Slot, done: Done) -> None:
        """What a driver has started must go on; what none has started needs nobody."""
        device = slot.vhost
        deadline = time.monotonic() + DRAIN_LIMIT
        fds: list[int] = []

        def work() -> None:
            try:
                device.detach(deadline)
            except BackendError:
                if not fds:
                    raise
                device.replace_backend(fds.pop(), deadline, drain=True)

        def finish(error: Exception | None) -> None:
            if error is not None and not in_use and device.is_in_use():
                try:  # again: a driver has started it meanwhile
                    self._replace_by_null(slot, done)
                except StratovirtError as caught:
                    done(caught)
                return
            if fds:  # it was not needed: the null worker sees it closed
                os.close(fds.pop())
                self._null.release(device)
            done(error)

        in_use = device.is_in_use()
        if in_use:
            fds.append(self._null.connect(device))
        self._vm.off_loop(work, finish)

    def _evict(self, slot: Slot, device: Device, done: Done) -> None:
        """Its worker hangs: kill it, wait until its I/O has ended, have the null back end
        answer for what is still in flight.

        While the kernel still does that I/O nobody may answer for it: the guest would use the
        memory for something else.  The device stays then, and gets a worker when it has ended.
        """
        worker, kind = device.worker, device.kind
        assert worker is not None and kind is not None
        worker.kill()

        def work() -> None:
            slot.vhost.lost("it was killed")
            kind.discard(kind.open(False, DEAD_LIMIT))

        def ended(error: Exception | None) -> None:
            if error is None:
                self._back_to_null(slot.vhost,
                                   lambda _: self._gone(slot, device, done, drained=False))
            else:
                worker.stopping = False
                self._null.release(slot.vhost)
                self._vm.supervisor.watch(device)
                done(error)

        self._vm.off_loop(work, ended)

    def _back_to_null(self, device: VhostUserDevice, done: Done) -> None:
        if device.is_in_use() and device.is_without_backend():
            self._null.attach(device, done)
        else:
            done(None)

    def _gone(self, slot: Slot, device: Device, done: Done, drained: bool) -> None:
        if device.worker is not None:
            device.worker.kill()
        assert slot.family is not None
        node = next((node for node in slot.family.nodes(self._machine).values()
                     if node.device_id == device.id), None)
        if node is None:
            self._leave(slot, device, done, drained)
        else:
            self.when_free(node, lambda: self._leave(slot, device, done, drained))

    def _leave(self, slot: Slot, device: Device, done: Done, drained: bool) -> None:
        slot.occupant = None
        slot.vhost.rename(slot.empty_name)
        slot.vhost.show_empty()
        del self._machine.devices[device.id]
        assert slot.family is not None
        nodes = slot.family.nodes(self._machine)
        for name, node in list(nodes.items()):
            if node.device_id == device.id:
                node.close()
                del nodes[name]
                slot.family.left(node, drained)
        self._vm.nursery().pages.drop(device.id)
        slot.device.on_config_change()
        self._vm.events.emit("DEVICE_DELETED", {"device": device.id, "path": device.id})
        done(None)

    # ---- slots without a device ------------------------------------------------------------

    def needed(self, slot: Slot) -> None:
        """A driver started a slot that has no back end now."""
        self.take_turn(lambda finish: self._serve_needy(slot, finish), _log_failure)

    def _serve_needy(self, slot: Slot, done: Done, kicked: bool = False) -> None:
        # A device whose worker has died leaves no empty slot: its next worker goes on with the
        # rings, once the I/O of the last one has ended.
        if slot.occupant is not None and self._vm.supervisor.brings_worker(slot.occupant):
            done(None)
        elif slot.occupant is None and slot.family is not None and not kicked:
            self._await_kick(slot)
            done(None)
        else:
            self._back_to_null(slot.answered, done)

    def _await_kick(self, slot: Slot) -> None:
        """Have the null back end serve an empty slot from its driver's first kick on: a driver
        starts what it finds, and then seldom asks a disk without sectors, a NIC without link."""
        self._forget_kicks(slot)  # of other queues, perhaps: the driver may have started it anew
        self._awaited[slot.number] = slot.vhost.kick_fds()
        for fd in self._awaited[slot.number]:
            self._vm.loop.add(fd, READ, lambda _: self._kicked(slot))

    def _kicked(self, slot: Slot) -> None:
        # The kick stays where it is, for who will serve it.
        self._forget_kicks(slot)
        self.take_turn(lambda finish: self._serve_needy(slot, finish, kicked=True), _log_failure)

    def _forget_kicks(self, slot: Slot) -> None:
        for fd in self._awaited.pop(slot.number, ()):
            self._vm.loop.remove(fd)

    def give_up(self, device: Device, done: Done) -> None:
        """In its turn: nobody but the null back end serves this device from now on."""
        if self._machine.devices.get(device.id) is not device:
            done(None)  # it went meanwhile
            return
        slot = self._machine.slots[device.slot]
        if not slot.device.has_null:
            done(DeviceError("nobody else can answer for it"))
            return
        if slot.family is not None:
            slot.vhost.show_failed()
        self._vm.off_loop(lambda: device.vhost.lost("it is given up"),
                          lambda _: self._null.attach(slot.answered, done))


def _log_failure(error: Exception | None) -> None:
    if error is not None:
        log.error(f"An empty slot has no back end: {error}")

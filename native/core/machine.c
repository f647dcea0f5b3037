// What every vCPU answers in C: UART, virtio-mmio slots, power registers, absent ports.
#include "core/core.h"
#include "include/clock.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define PORT_8042_DATA 0x60
#define PORT_SYSTEM_B 0x61
#define PORT_8042 0x64
#define PORT_RTC_INDEX 0x70
#define PORT_RTC_DATA 0x71
#define RESET_PULSE 0xfe

#define SLEEP_ENABLE 0x20

// A slot's place follows from its address: those of a machine lie side by side.
struct slot {
	uint64_t base;
	struct sv_virtio *_Atomic device; // NULL: there is none
};

struct sv_machine {
	struct sv_uart *uart;
	uint16_t uart_port;
	bool has_power;
	uint64_t power_base;
	pthread_mutex_t lock; // who adds slots, and what follows
	pthread_cond_t let_go;
	_Atomic int held; // SV_HOLD_*
	bool entered;     // a vCPU that waited for SV_HOLD_GUEST goes on
	_Atomic uint8_t rtc_index;
	struct slot slots[SV_MAX_VIRTIO];
	uint8_t absent[65536 / 8]; // ports that read all ones and ignore writes
};

// Ports that guests probe although the machine has nothing there: answered here, because an
// answer by Python costs as much as many probes. Others go to Python, which says the same.
static const struct {
	uint16_t port, count;
} absent_ports[] = {
	{0x0000, 0x20}, {0x002e, 2},    {0x004e, 2},    {0x0060, 1},    {0x0062, 2},
	{0x0070, 8},    {0x0080, 0x20}, {0x00c0, 0x20}, {0x00ed, 1},    {0x00f0, 0x10},
	{0x0170, 8},    {0x01f0, 8},    {0x0278, 8},    {0x02e8, 8},    {0x02f8, 8},
	{0x0376, 10},   {0x03b0, 0x30}, {0x03e8, 8},    {0x03f0, 0x10}, {0x0510, 12},
	{0x0cf8, 8},    {0x5658, 2},
};

static void mark_ports(struct sv_machine *machine, uint32_t port, uint32_t count, bool absent)
{
	for (uint32_t p = port; p < port + count; p++) {
		if (absent)
			machine->absent[p / 8] |= 1u << p % 8;
		else
			machine->absent[p / 8] &= ~(1u << p % 8);
	}
}

int sv_machine_create(struct sv_machine **out)
{
	struct sv_machine *machine = calloc(1, sizeof(*machine));

	if (!machine)
		return -ENOMEM;
	pthread_mutex_init(&machine->lock, NULL);
	pthread_cond_init(&machine->let_go, NULL);
	for (size_t i = 0; i < sizeof(absent_ports) / sizeof(absent_ports[0]); i++)
		mark_ports(machine, absent_ports[i].port, absent_ports[i].count, true);
	*out = machine;
	return 0;
}

void sv_machine_destroy(struct sv_machine *machine)
{
	if (!machine)
		return;
	for (uint32_t i = 0; i < SV_MAX_VIRTIO; i++)
		sv_virtio_put(machine->slots[i].device);
	pthread_cond_destroy(&machine->let_go);
	pthread_mutex_destroy(&machine->lock);
	free(machine);
}

void sv_machine_hold(struct sv_machine *machine, int what)
{
	pthread_mutex_lock(&machine->lock);
	atomic_store(&machine->held, what);
	pthread_cond_broadcast(&machine->let_go);
	pthread_mutex_unlock(&machine->lock);
}

bool sv_machine_await(struct sv_machine *machine, int what)
{
	if (atomic_load_explicit(&machine->held, memory_order_acquire) < what)
		return false;
	pthread_mutex_lock(&machine->lock);
	while (atomic_load(&machine->held) >= what)
		pthread_cond_wait(&machine->let_go, &machine->lock);
	if (what == SV_HOLD_GUEST) {
		machine->entered = true;
		pthread_cond_broadcast(&machine->let_go);
	}
	pthread_mutex_unlock(&machine->lock);
	return true;
}

void sv_machine_wait_entered(struct sv_machine *machine, uint64_t ns)
{
	struct timespec at = sv_in_ns(ns);

	pthread_mutex_lock(&machine->lock);
	while (!machine->entered &&
	       pthread_cond_clockwait(&machine->let_go, &machine->lock, CLOCK_MONOTONIC, &at) == 0)
		;
	pthread_mutex_unlock(&machine->lock);
}

int sv_machine_add_uart(struct sv_machine *machine, uint16_t port, struct sv_uart *uart)
{
	if (port > 65536 - SV_UART_PORTS)
		return -EINVAL;
	if (machine->uart)
		return -EBUSY;
	machine->uart_port = port;
	machine->uart = uart;
	return 0;
}

int sv_machine_add_power(struct sv_machine *machine, uint64_t base)
{
	if (machine->has_power)
		return -EBUSY;
	machine->power_base = base;
	machine->has_power = true;
	return 0;
}

static struct slot *place_of(struct sv_machine *machine, uint64_t base)
{
	return &machine->slots[base / SV_VIRTIO_MMIO_SIZE % SV_MAX_VIRTIO];
}

int sv_machine_add_virtio(struct sv_machine *machine, uint64_t base, struct sv_virtio *device)
{
	struct slot *slot = place_of(machine, base);
	int ret = 0;

	if (base % SV_VIRTIO_MMIO_SIZE)
		return -EINVAL;
	pthread_mutex_lock(&machine->lock);
	if (atomic_load(&slot->device)) {
		ret = slot->base == base ? -EEXIST : -ENOSPC;
	} else {
		sv_virtio_get(device);
		slot->base = base;
		// The vCPUs read the device first: they see the base with it.
		atomic_store_explicit(&slot->device, device, memory_order_release);
	}
	pthread_mutex_unlock(&machine->lock);
	return ret;
}

int sv_machine_forward_ports(struct sv_machine *machine, uint32_t port, uint32_t count)
{
	if (port > 65536 || count > 65536 - port)
		return -EINVAL;
	mark_ports(machine, port, count, false);
	return 0;
}

static bool is_absent(const struct sv_machine *machine, uint16_t port)
{
	return machine->absent[port / 8] & 1u << port % 8;
}

// One byte of a port that this file knows: wider accesses are several bytes, as on an ISA bus.
static int serve_byte(struct sv_machine *machine, uint16_t port, bool write, uint8_t *data)
{
	uint32_t offset = (uint32_t)port - machine->uart_port;

	if (machine->uart && offset < SV_UART_PORTS) {
		if (write)
			sv_uart_write(machine->uart, offset, *data);
		else
			*data = sv_uart_read(machine->uart, offset);
		return SV_SERVED;
	}
	if (write) {
		if (port == PORT_RTC_INDEX)
			atomic_store(&machine->rtc_index, *data);
		return port == PORT_8042 && *data == RESET_PULSE ? SV_EXIT_RESET : SV_SERVED;
	}
	*data = 0xff;
	if (port == PORT_RTC_DATA)
		*data = sv_rtc_read(atomic_load(&machine->rtc_index));
	// Input buffer empty, so that `reboot=k` writes its pulse at once; output never drained,
	// so that Linux's i8042 probe gives up in a millisecond instead of half a second.
	if (port == PORT_8042)
		*data = 0xfd;
	// Without KVM's own speaker port: timer 2 has always expired.
	if (port == PORT_SYSTEM_B)
		*data = 0x20;
	return SV_SERVED;
}

static bool is_known(const struct sv_machine *machine, uint16_t port)
{
	return is_absent(machine, port) || port == PORT_8042 || port == PORT_SYSTEM_B ||
	       (machine->uart && (uint32_t)port - machine->uart_port < SV_UART_PORTS);
}

int sv_machine_port(struct sv_machine *machine, uint16_t port, uint32_t size, bool write,
		    uint8_t *data)
{
	if (!is_known(machine, port))
		return SV_FORWARD;
	for (uint32_t i = 0; i < size; i++) {
		int ret = serve_byte(machine, (uint16_t)(port + i), write, data + i);

		if (ret != SV_SERVED)
			return ret;
	}
	return SV_SERVED;
}

static int serve_power(uint64_t offset, bool write, uint8_t *data)
{
	if (!write) {
		*data = 0; // WAK_STS is never set: we don't wake, we start
		return SV_SERVED;
	}
	if (offset == 0 && *data & SLEEP_ENABLE && (*data >> 2 & 7) == SV_SLEEP_TYPE_S5)
		return SV_EXIT_POWEROFF;
	if (offset == 2 && *data == SV_RESET_VALUE)
		return SV_EXIT_RESET;
	return SV_SERVED;
}

static struct sv_virtio *find_virtio(struct sv_machine *machine, uint64_t base)
{
	struct slot *slot = place_of(machine, base);
	struct sv_virtio *device = atomic_load_explicit(&slot->device, memory_order_acquire);

	return device && slot->base == base ? device : NULL;
}

int sv_machine_mmio(struct sv_machine *machine, uint64_t address, uint32_t size, bool write,
		    uint8_t *data)
{
	uint32_t offset = address % SV_VIRTIO_MMIO_SIZE;
	struct sv_virtio *device = find_virtio(machine, address - offset);

	if (device)
		return sv_virtio_mmio(device, offset, size, write, data);
	if (machine->has_power && size == 1 && address - machine->power_base < SV_POWER_REGISTERS)
		return serve_power(address - machine->power_base, write, data);
	return SV_FORWARD;
}

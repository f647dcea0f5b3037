// Set-up, and what is done for all queues.
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "console/internal.h"

#define MAGIC 0x53564331u // "SVC1"

size_t sv_console_state_size(void)
{
	return sizeof(struct sv_console_state);
}

static bool is_port_queue(unsigned int index)
{
	return index != SV_CONSOLE_CONTROL_RX && index != SV_CONSOLE_CONTROL_TX;
}

static unsigned int port_of(unsigned int index)
{
	return index < 2 ? 0 : index / 2 - 1;
}

void sv_console_await(struct sv_ring_device *device, unsigned int nr, short add, short drop)
{
	struct console *console = device->own;
	struct port *port = &console->ports[nr];

	port->events = (short)((port->events & ~drop) | add);
	sv_ring_await(device, nr, port->is.fd, port->events);
}

static enum sv_ring_next serve(struct sv_ring_device *device, unsigned int index)
{
	if (index == SV_CONSOLE_CONTROL_RX)
		return sv_console_tell(device);
	if (index == SV_CONSOLE_CONTROL_TX)
		return sv_console_listen(device);
	return index % 2 ? sv_console_transmit(device, port_of(index))
			 : sv_console_receive(device, port_of(index));
}

static void ready(struct sv_ring_device *device, unsigned int slot, short events)
{
	short woken = events & ~(POLLIN | POLLOUT) ? POLLIN | POLLOUT : events;

	sv_console_await(device, slot, 0, woken);
	if (woken & POLLIN)
		sv_ring_due(device, sv_console_rx(slot));
	if (woken & POLLOUT)
		sv_ring_due(device, sv_console_rx(slot) + 1);
}

static void stopping(struct sv_ring_device *device, unsigned int index)
{
	if (is_port_queue(index))
		sv_console_await(device, port_of(index), 0, index % 2 ? POLLOUT : POLLIN);
}

static void forget(struct sv_console_state *state)
{
	memset(state, 0, sizeof(*state));
	state->magic = MAGIC;
}

static void reset(struct sv_ring_device *device)
{
	struct console *console = device->own;

	forget(console->state);
}

// The front end may have wiped the state after a reset, under our feet: what is written from now
// on counts for a successor.
static void negotiated(struct sv_ring_device *device)
{
	struct console *console = device->own;

	console->state->magic = MAGIC;
}

static void destroy(struct sv_ring_device *device)
{
	struct console *console = device->own;

	free(console->own_state);
	free(console);
}

static const struct sv_ring_kind kind = {
	.serve = serve,
	.ready = ready,
	.stopping = stopping,
	.negotiated = negotiated,
	.reset = reset,
	.destroy = destroy,
};

// Whether a predecessor left this, or something like it.
static bool makes_sense(const struct sv_console_state *state)
{
	if (state->magic != MAGIC || state->device_ready > 1)
		return false;
	for (unsigned int nr = 0; nr < SV_CONSOLE_MAX_PORTS; nr++) {
		const struct sv_console_port_state *port = &state->ports[nr];

		if ((port->ready | port->guest_open | port->told_port | port->told_console |
		     port->told_name | port->told_open) > 1)
			return false;
	}
	return true;
}

static struct console *make(const struct sv_console_port *ports, unsigned int max_ports,
			    struct sv_console_state *state)
{
	struct console *console = calloc(1, sizeof(*console));

	if (!console)
		return NULL;
	console->max_ports = max_ports;
	for (unsigned int nr = 0; nr < max_ports; nr++) {
		console->ports[nr].is = ports[nr];
		console->ports[nr].is.name[SV_CONSOLE_NAME_BYTES - 1] = 0;
	}
	if (!state) {
		state = console->own_state = calloc(1, sizeof(*state));
		if (!state) {
			free(console);
			return NULL;
		}
	}
	console->state = state;
	if (!makes_sense(state))
		forget(state);
	return console;
}

struct sv_ring_device *sv_console_create(const struct sv_console_port *ports,
					 unsigned int max_ports, unsigned int queue_size,
					 struct sv_console_counters *counters,
					 struct sv_console_state *state, int *error)
{
	struct sv_ring_device *device;
	struct console *console;

	*error = -EINVAL;
	if (!max_ports || max_ports > SV_CONSOLE_MAX_PORTS)
		return NULL;
	*error = -ENOMEM;
	console = make(ports, max_ports, state);
	if (!console)
		return NULL;
	device = sv_ring_create(&kind, console, 2 * max_ports + 2, queue_size, counters,
				sizeof(*counters), error);
	if (!device) {
		free(console->own_state);
		free(console);
	}
	return device;
}

struct order {
	unsigned int nr;
	bool open;
	uint16_t cols, rows;
};

static struct port *find(struct sv_ring_device *device, unsigned int nr)
{
	struct console *console = device->own;

	return nr < console->max_ports && console->ports[nr].is.fd != -1 ? &console->ports[nr]
									  : NULL;
}

static int set_open(struct sv_ring_device *device, void *argument)
{
	const struct order *order = argument;
	struct port *port = find(device, order->nr);

	if (!port)
		return -ENOENT;
	port->is.open = order->open;
	sv_ring_due(device, SV_CONSOLE_CONTROL_RX);
	// What waits is dropped, or goes on.
	sv_ring_due(device, sv_console_rx(order->nr) + 1);
	return 0;
}

static int set_size(struct sv_ring_device *device, void *argument)
{
	const struct order *order = argument;
	struct port *port = find(device, order->nr);

	if (!port)
		return -ENOENT;
	port->is.cols = order->cols;
	port->is.rows = order->rows;
	sv_ring_due(device, SV_CONSOLE_CONTROL_RX);
	return 0;
}

int sv_console_set_open(struct sv_ring_device *device, unsigned int nr, bool open)
{
	struct order order = {.nr = nr, .open = open};

	return sv_ring_call(device, set_open, &order);
}

int sv_console_set_size(struct sv_ring_device *device, unsigned int nr, uint16_t cols,
			uint16_t rows)
{
	struct order order = {.nr = nr, .cols = cols, .rows = rows};

	return sv_ring_call(device, set_size, &order);
}

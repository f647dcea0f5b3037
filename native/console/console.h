// virtio-console (virtio 1.2, 5.3): ports between virtqueues and stream sockets of the host.
//
// Queues 0 and 1 receive and transmit for port 0, 2 and 3 carry control messages to and from the
// driver, 2n + 2 and 2n + 3 are port n's. What the driver doesn't take stays in the socket; what
// the socket doesn't take stays in the port's queue; other ports go on.
#pragma once

#include "ring/ring.h"

#define SV_CONSOLE_MAX_PORTS 31
#define SV_CONSOLE_NAME_BYTES 256

// Of each queue. The layout is that of the statistics page, shared/statistics.py.
struct sv_console_counters {
	struct sv_ring_counters ring;
	uint64_t bytes;   // passed on
	uint64_t unheard; // bytes that were sent while nobody was there
	uint64_t waits;   // times that output waited for its reader
	uint64_t errors;  // control messages that make no sense
};

struct sv_console_port {
	int fd;        // a stream socket, stays the caller's, open until destroy; -1: no such port
	bool console;  // for the driver: a terminal
	bool open;     // somebody is at the host's end
	uint16_t cols, rows; // 0: unknown
	char name[SV_CONSOLE_NAME_BYTES]; // terminated; empty: none
};

// What driver and device have told each other, in memory that outlives a worker: its successor
// goes on with it. sv_console_state_size() bytes, zeroed at first; checked when read.
struct sv_console_state;
size_t sv_console_state_size(void);

// `ports`: `max_ports` of them, number by number. `counters`: 2 * max_ports + 2, see
// sv_ring_create. `state`: valid until destroy, or NULL. NULL with *error = negative errno.
struct sv_ring_device *sv_console_create(const struct sv_console_port *ports,
					 unsigned int max_ports, unsigned int queue_size,
					 struct sv_console_counters *counters,
					 struct sv_console_state *state, int *error);

// Somebody came to the host's end of a port, or left. -ENOENT: no such port.
int sv_console_set_open(struct sv_ring_device *device, unsigned int nr, bool open);

// The terminal at the host's end has this size now. -ENOENT: no such port.
int sv_console_set_size(struct sv_ring_device *device, unsigned int nr, uint16_t cols,
			uint16_t rows);

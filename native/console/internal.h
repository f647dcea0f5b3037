// Between the files of native/console only.
#pragma once

#include "console/console.h"

#define SV_CONSOLE_CONTROL_RX 2 // to the driver
#define SV_CONSOLE_CONTROL_TX 3
#define SV_CONSOLE_BATCH 64     // chains between two looks at everything else,
#define SV_CONSOLE_BATCH_BYTES 65536 // or so many bytes

// Not bool: they come back from memory that a predecessor wrote.
struct sv_console_port_state {
	uint8_t ready;         // the driver says that it has the port
	uint8_t guest_open;    // somebody in the guest has it open
	uint8_t told_port;     // the driver was told that there is the port,
	uint8_t told_console;  // that it is a terminal,
	uint8_t told_name;     // its name,
	uint8_t told_open;     // that somebody is there,
	uint16_t told_cols, told_rows; // and its size
	uint16_t sent_index;   // available entry of which `sent` bytes have gone
	uint64_t sent;
};

struct sv_console_state {
	uint32_t magic;
	uint32_t device_ready;
	struct sv_console_port_state ports[SV_CONSOLE_MAX_PORTS];
};

struct port {
	struct sv_console_port is;
	bool gone;             // the socket has ended
	short events;          // awaited
};

struct console {
	unsigned int max_ports;
	struct port ports[SV_CONSOLE_MAX_PORTS];
	struct sv_console_state *state, *own_state;
};

static inline struct sv_console_counters *sv_console_counters_of(struct sv_ring_device *device,
								  unsigned int index)
{
	return (struct sv_console_counters *)device->queues[index].counters;
}

static inline unsigned int sv_console_rx(unsigned int nr)
{
	return nr ? 2 * nr + 2 : 0;
}

static inline bool sv_console_has(const struct sv_ring_device *device, unsigned int feature)
{
	return device->features & (1ull << feature);
}

// Remember something for a successor, in the order of the program.
#define SV_CONSOLE_REMEMBER(place, value)                 \
	do {                                              \
		__atomic_signal_fence(__ATOMIC_SEQ_CST);  \
		(place) = (value);                        \
		__atomic_signal_fence(__ATOMIC_SEQ_CST);  \
	} while (0)

// One batch of each kind of queue.
enum sv_ring_next sv_console_tell(struct sv_ring_device *device);
enum sv_ring_next sv_console_listen(struct sv_ring_device *device);
enum sv_ring_next sv_console_receive(struct sv_ring_device *device, unsigned int nr);
enum sv_ring_next sv_console_transmit(struct sv_ring_device *device, unsigned int nr);

// Wait (or not) for events of the port's socket.
void sv_console_await(struct sv_ring_device *device, unsigned int nr, short add, short drop);

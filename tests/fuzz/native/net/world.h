// One input's device, driver and network.
#pragma once

#include "harness/guest.h"
#include "harness/ledger.h"
#include "harness/system.h"
#include "harness/tape.h"
#include "net/internal.h"

#define MAX_PAIRS 3
#define MAX_QUEUES (2 * MAX_PAIRS + 1)

// Bits of the input's first byte; 0 and 1 are the number of pairs.
enum {
	F_CONTROL = 4, F_STATE = 16, F_HOSTILE_STATE = 32, F_LIMIT = 64,
	F_NO_TAP = 128,
};
// Of the second.
enum {
	F_MERGE = 1, F_EVENT = 2, F_INDIRECT = 4, F_COMMANDS = 8, F_OFFLOADS = 16, F_ANY = 32,
	F_FAIL = 64,
};

// What came over the tap and is being given to the driver.
struct frame {
	uint64_t length, given;
	unsigned int buffers;  // chains given
	unsigned int promised; // num_buffers; 0: not known
	uint16_t begin;        // used index before it
	const uint8_t *data;   // what was read; NULL: not known
};

struct world {
	struct sv_net *net;
	struct sv_net_state *state;
	struct sv_net_counters counters[MAX_QUEUES];
	struct guest_ring rings[MAX_QUEUES];
	struct frame frames[MAX_QUEUES];
	uint64_t received[MAX_QUEUES]; // frames taken from the tap
	bool refusable;                // the command at hand makes no sense
	uint16_t bases[MAX_QUEUES];
	unsigned int pairs, count;
	uint8_t flags, more;
	void *(*run)(void *);         // a queue's thread
	struct sv_net_queue *current; // whose thread runs
	unsigned int polls;
	unsigned long limit;   // of ledger_calls, until it is asked to end
	unsigned long stopped; // ledger_calls when it was
	bool refused;          // the tap has refused something
	bool gone[MAX_PAIRS];  // the interface of this tap is
	bool told[MAX_QUEUES]; // this queue was
	bool attached[MAX_PAIRS];
	unsigned int offloads;
};

extern struct world world;
extern int taps[MAX_PAIRS], peers[MAX_PAIRS], kicks[MAX_QUEUES];

// Threads that are real: a target of its own.
static inline bool threads(void)
{
#ifdef FUZZ_THREADS
	return true;
#else
	return false;
#endif
}

static inline enum sv_net_kind kind_of(unsigned int index)
{
	if (index == 2 * world.pairs)
		return SV_NET_CONTROL;
	return index % 2 ? SV_NET_TRANSMIT : SV_NET_RECEIVE;
}

static inline unsigned int index_of(const struct sv_net_queue *queue)
{
	return (unsigned int)(queue - world.net->queues);
}

// checks.c: what must hold.
void epoch_begin(void);
// A frame was given as a whole or not at all, and the driver saw no part of it before the rest.
void end_frame(unsigned int index);
void on_pop(unsigned int index, struct sv_chain *chain);
void on_push(unsigned int index, uint16_t head, uint32_t written);
void check_counters(void);
// The tap is in the state that the settings say.
void check_tap(void);

// tap.c: the system.
void use_system(void);

// driver.c: what may happen at any time.
void act(void);
void drain(int fd);

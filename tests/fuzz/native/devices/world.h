// One input's device on the engine for small devices (native/ring), its driver and its host.
#pragma once

#include "harness/guest.h"
#include "harness/ledger.h"
#include "harness/system.h"
#include "harness/tape.h"
#include "ring/ring.h"

#define MAX_QUEUES 8
#define COUNTER_BYTES 256 // of a queue, for any kind

// Bits of the input's first byte, the same for all kinds.
enum {
	F_EVENT = 1, F_INDIRECT = 2, F_FAIL = 4, F_STATE = 8, F_HOSTILE_STATE = 16,
	F_KEEP = 32, // a balloon that gives nothing back
};

struct world {
	struct sv_ring_device *device;
	uint8_t counters[MAX_QUEUES * COUNTER_BYTES] __attribute__((aligned(64)));
	struct guest_ring rings[MAX_QUEUES];
	uint16_t bases[MAX_QUEUES];
	unsigned int count;
	uint8_t flags, more; // `more`: the kind's
	void *(*run)(void *); // the device's thread
	bool has_thread;
	bool runs;            // it does
	bool calling;         // until it has done a control call
	bool paused;          // it is asked to stop by us
	unsigned int polls;
	unsigned long looked; // ledger_calls when it looked up last
};

extern struct world world;
extern int kicks[MAX_QUEUES];

// What is particular to a kind of device.
struct fuzz_kind {
	const struct guest_region *regions;
	unsigned int region_count;
	size_t counter_bytes;
	// Calls of native/virtq between two looks of the thread, for each queue.
	unsigned long longest;
	unsigned int (*queues)(void);
	struct sv_ring_device *(*create)(void *counters, int *error);
	uint64_t (*features)(void);
	int (*shape)(unsigned int index); // of a chain, GUEST_WRITE_ALL...
	void (*act)(uint8_t kind);        // what its driver and its host may do at any time
	void (*control)(uint8_t kind);    // its control calls
	void (*popped)(unsigned int index, struct sv_chain *chain);
	void (*pushing)(unsigned int index, uint16_t head, uint32_t written);
	void (*epoch)(void); // the device is about to run
	void (*check)(void); // no queue runs
	void (*made)(void);  // a device was made, and has its memory
	void (*begin)(void); // of an input, and its end
	void (*end)(void);
};

extern const struct fuzz_kind fuzz_kind;

// engine.c
void use_system(void);
// Let the device's thread run for a while.
void slice(void);

// target.c
void act(void);

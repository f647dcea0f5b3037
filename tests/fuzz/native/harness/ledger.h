// What a device does with its queues, kept beside it: calls of native/virtq are led here
// (intercept.h), checked, and passed on. Chains are given back once, only those that were taken,
// and with no more bytes than they hold.
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "virtq/virtq.h"

#define LEDGER_QUEUES 64
#define LEDGER_SIZE 128 // descriptors of the largest ring

struct ledger_chain {
	bool taken;
	uint16_t out_count, in_count;
	uint64_t in_bytes;
	struct iovec *iov;
};

// One run of a queue: from its start to its stop.
struct ledger {
	struct sv_virtq *vq;
	uint16_t base;        // where it began
	unsigned int taken;   // and not given back
	unsigned int pops, pushes;
	uint64_t all_pushes;  // of all runs
	uint16_t order[LEDGER_SIZE]; // the heads that are taken, the last one last
	struct ledger_chain chains[LEDGER_SIZE];
};

extern struct ledger ledgers[LEDGER_QUEUES];
// Which of the device's queues it is.
extern unsigned int (*ledger_index)(const struct sv_virtq *vq);
// Called with a chain that was taken, and before one is given back; may be NULL.
extern void (*ledger_popped)(unsigned int index, struct sv_chain *chain);
extern void (*ledger_pushing)(unsigned int index, uint16_t head, uint32_t written);

// A queue whose ring held could not be started.
void ledger_cancel(unsigned int index);
// The queue was stopped, `next` is what it told.
void ledger_end(unsigned int index, int next);
// The device has taken these chains: it may write to them.
void ledger_allow(unsigned int index);
// Of all queues, since the input began; a bound on what a device does before it looks up.
extern unsigned long ledger_calls;
void ledger_forget(void);

// What a queue with a thread of its own signals: the driver, by its call descriptor, and the front
// end, by its error descriptor. Both are duplicated; the control thread changes them.
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/eventfd.h>

struct sv_signals {
	int call_fd;   // always a descriptor of ours: dup3 onto it replaces it atomically
	bool has_call; // atomic
	int err_fd;    // ours while the queue runs; -1: none
};

int sv_signals_init(struct sv_signals *signals);
void sv_signals_deinit(struct sv_signals *signals);
// For a run; -1: none. -errno: nothing is kept.
int sv_signals_begin(struct sv_signals *signals, int call_fd, int err_fd);
void sv_signals_end(struct sv_signals *signals);
// Another call descriptor, -1: none, for a queue that may run.
int sv_signals_set_call(struct sv_signals *signals, int fd);

// Interrupt the driver, if it has a call descriptor, and count it.
static inline void sv_signals_call(struct sv_signals *signals, uint64_t *count)
{
	if (!__atomic_load_n(&signals->has_call, __ATOMIC_ACQUIRE))
		return;
	++*count;
	eventfd_write(signals->call_fd, 1);
}

// The queue is broken: tell the front end once. The control thread reads the reason once it sees
// that *broken is set.
void sv_signals_broken(struct sv_signals *signals, uint64_t *broken);

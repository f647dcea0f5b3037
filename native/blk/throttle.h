// Limits on requests and bytes a second: token buckets that all queues of a device share.
//
// A bucket fills with its rate and holds at most its burst. A request starts when each bucket
// that it draws from has what it needs, or is full: then it goes into debt, and what comes next
// waits for that. Reads, writes, discards and zeroing count as a request; reads and writes as
// their bytes; FLUSH and GET_ID as nothing.
#pragma once

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

enum sv_limit {
	SV_LIMIT_OPS,
	SV_LIMIT_READ_OPS,
	SV_LIMIT_WRITE_OPS,
	SV_LIMIT_BYTES,
	SV_LIMIT_READ_BYTES,
	SV_LIMIT_WRITE_BYTES,
	SV_LIMITS,
};

// By enum sv_limit. rate 0: no limit; burst 0: what 100 ms at the rate give.
struct sv_limits {
	uint64_t rate[6]; // a second
	uint64_t burst[6];
};

struct sv_throttle {
	bool active;             // atomic: there is a limit
	pthread_mutex_t lock;    // everything below
	uint64_t filled_at;      // sv_now_ns
	struct sv_limits limits; // bursts filled in
	double level[SV_LIMITS];
};

void sv_throttle_init(struct sv_throttle *throttle);
void sv_throttle_deinit(struct sv_throttle *throttle);

// Other limits, from now on; all buckets are full. -EINVAL: a rate or burst beyond 2^50.
int sv_throttle_set(struct sv_throttle *throttle, const struct sv_limits *limits, uint64_t now);

static inline bool sv_throttle_active(const struct sv_throttle *throttle)
{
	return __atomic_load_n(&throttle->active, __ATOMIC_RELAXED);
}

// Take what one request of `bytes` needs. 0: taken; else nothing was, and nanoseconds until it
// is worth trying again. `force`: take it in any case.
uint64_t sv_throttle_take(struct sv_throttle *throttle, bool write, uint64_t bytes, uint64_t now,
			  bool force);

#include "blk/throttle.h"

#include <errno.h>
#include <string.h>

#define MAX_RATE (1ull << 50)
#define BURST_DIVISOR 10 // of the rate, if no burst is given

_Static_assert(SV_LIMITS == sizeof(((struct sv_limits *)0)->rate) / sizeof(uint64_t),
	       "a rate for each limit");

void sv_throttle_init(struct sv_throttle *throttle)
{
	memset(throttle, 0, sizeof(*throttle));
	pthread_mutex_init(&throttle->lock, NULL);
}

void sv_throttle_deinit(struct sv_throttle *throttle)
{
	pthread_mutex_destroy(&throttle->lock);
}

int sv_throttle_set(struct sv_throttle *throttle, const struct sv_limits *limits, uint64_t now)
{
	bool active = false;

	for (int i = 0; i < SV_LIMITS; i++) {
		if (limits->rate[i] > MAX_RATE || limits->burst[i] > MAX_RATE)
			return -EINVAL;
		active |= limits->rate[i] != 0;
	}
	pthread_mutex_lock(&throttle->lock);
	throttle->limits = *limits;
	throttle->filled_at = now;
	for (int i = 0; i < SV_LIMITS; i++) {
		uint64_t *burst = &throttle->limits.burst[i];

		if (!*burst)
			*burst = limits->rate[i] / BURST_DIVISOR;
		if (!*burst)
			*burst = 1;
		throttle->level[i] = (double)*burst;
	}
	__atomic_store_n(&throttle->active, active, __ATOMIC_RELAXED);
	pthread_mutex_unlock(&throttle->lock);
	return 0;
}

static void fill(struct sv_throttle *throttle, uint64_t now)
{
	double seconds;

	// Another queue's thread may have looked at its clock later and come first.
	if (now <= throttle->filled_at)
		return;
	seconds = (double)(now - throttle->filled_at) * 1e-9;
	throttle->filled_at = now;
	for (int i = 0; i < SV_LIMITS; i++) {
		double full = (double)throttle->limits.burst[i];

		throttle->level[i] += (double)throttle->limits.rate[i] * seconds;
		if (throttle->level[i] > full)
			throttle->level[i] = full;
	}
}

uint64_t sv_throttle_take(struct sv_throttle *throttle, bool write, uint64_t bytes, uint64_t now,
			  bool force)
{
	const enum sv_limit drawn[] = {SV_LIMIT_OPS, write ? SV_LIMIT_WRITE_OPS : SV_LIMIT_READ_OPS,
				       SV_LIMIT_BYTES,
				       write ? SV_LIMIT_WRITE_BYTES : SV_LIMIT_READ_BYTES};
	const double cost[] = {1, 1, (double)bytes, (double)bytes};
	double wait = 0;

	pthread_mutex_lock(&throttle->lock);
	fill(throttle, now);
	for (int i = 0; i < 4; i++) {
		double rate = (double)throttle->limits.rate[drawn[i]];
		double full = (double)throttle->limits.burst[drawn[i]];
		double missing = (cost[i] < full ? cost[i] : full) - throttle->level[drawn[i]];

		if (rate > 0 && missing > 0 && missing / rate > wait)
			wait = missing / rate;
	}
	if (force)
		wait = 0;
	for (int i = 0; i < 4 && wait <= 0; i++) {
		if (throttle->limits.rate[drawn[i]])
			throttle->level[drawn[i]] -= cost[i];
	}
	pthread_mutex_unlock(&throttle->lock);
	if (wait <= 0)
		return 0;
	return wait > 1e6 ? 1000000000000000ull : (uint64_t)(wait * 1e9) + 1;
}

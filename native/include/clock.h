// Monotonic time in nanoseconds.
#pragma once

#include <stdint.h>
#include <time.h>

static inline uint64_t sv_now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000ull + (uint64_t)ts.tv_nsec;
}

// The moment that lies so far ahead, for waits by CLOCK_MONOTONIC.
static inline struct timespec sv_in_ns(uint64_t ns)
{
	uint64_t until = sv_now_ns() + ns;

	return (struct timespec){(time_t)(until / 1000000000ull), (long)(until % 1000000000ull)};
}

// A token bucket: so many packets and bytes a second, for all threads that share it.
#pragma once

#include <pthread.h>
#include <stdint.h>

// 0: no limit.
struct sv_rate {
	uint64_t packets; // a second
	uint64_t bytes;   // a second
};

// What passes moves the times on by what it costs at the rate; while one lies further in the
// future than a burst allows, nothing passes.
struct sv_bucket {
	pthread_mutex_t lock;
	struct sv_rate rate;
	uint64_t burst; // ns of the rate
	uint64_t packets_until, bytes_until; // ns, monotonic
};

void sv_bucket_init(struct sv_bucket *bucket, const struct sv_rate *rate, uint64_t burst_ns);
void sv_bucket_deinit(struct sv_bucket *bucket);

// Nanoseconds (monotonic) until which nothing may pass; 0: something may now.
uint64_t sv_bucket_wait(struct sv_bucket *bucket);

// A packet of this many bytes has passed.
void sv_bucket_take(struct sv_bucket *bucket, uint64_t bytes);

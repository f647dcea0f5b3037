// virtio-rng (virtio 1.2, 5.4): random bytes from a descriptor of the host.
#pragma once

#include "ring/ring.h"

// Of one request at most, whatever the driver's buffers hold.
#define SV_RNG_MAX_BYTES (1 << 20)

// The layout is that of the statistics page, shared/statistics.py.
struct sv_rng_counters {
	struct sv_ring_counters ring;
	uint64_t bytes;     // given to the guest
	uint64_t throttled; // times a request waited for the limit
	uint64_t starved;   // times a request waited for the source
	uint64_t errors;    // of the source
};

// `source`: non-blocking, stays the caller's, open until destroy. At most `max_bytes` in
// `period_ms` on average; 0: no limit. `counters`: of the one queue, see sv_ring_create. NULL
// with *error = negative errno.
struct sv_ring_device *sv_rng_create(int source, uint64_t max_bytes, unsigned int period_ms,
				     unsigned int queue_size, struct sv_rng_counters *counters,
				     int *error);

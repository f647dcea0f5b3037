// virtio-balloon (virtio 1.2, 5.5): memory that the guest doesn't use goes back to the host.
//
// It goes by MADV_REMOVE on the mapping of guest memory, which punches a hole in the file behind:
// every process that maps it loses the pages, and whoever touches one again finds zeroes.
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "ring/ring.h"

// 0 inflates, 1 deflates. Statistics and reporting follow without a gap where the driver took
// them: so Linux (vm_find_vqs) and QEMU number queues. The specification has reporting at 4
// whatever the others are (5.5.2): that works too.
#define SV_BALLOON_QUEUES 5
// Page frame numbers of one chain; what goes beyond is refused. Linux sends 256.
#define SV_BALLOON_MAX_PFNS (1u << 18)
// Entries of a buffer with statistics that are looked at; Linux sends 16.
#define SV_BALLOON_MAX_ENTRIES 64
// Tags of statistics that are known: those below. Ten are of the specification (5.5.6.4), six
// more of Linux 6.12.
#define SV_BALLOON_TAGS 16

// The layout is that of the statistics page, shared/statistics.py. Pages are of 4 KiB.
struct sv_balloon_counters {
	struct sv_ring_counters ring;
	uint64_t inflated_pages; // that the driver gave
	uint64_t deflated_pages; // that it took back
	uint64_t reported_pages; // that it said are free
	uint64_t removed_bytes;  // given back to the host
	uint64_t removals;       // calls that did it
	uint64_t failed_bytes;   // that the host didn't take
	uint64_t refused_pages;  // that the driver named and that are no RAM, or too many
	uint64_t reports;        // buffers with statistics that were asked for
	uint64_t padding[4];     // to whole cache lines
};

// What came since it was asked for last.
struct sv_balloon_news {
	bool told;        // statistics
	uint32_t present; // bit n: there is a value with tag n
	uint64_t values[SV_BALLOON_TAGS];
	int error;        // errno: the host doesn't take pages, for a reason not told yet; 0
};

// `keep`: nothing goes back to the host, the driver gets its answers and that is all.
// `counters`: SV_BALLOON_QUEUES of them, see sv_ring_create. NULL with *error = negative errno.
struct sv_ring_device *sv_balloon_create(bool keep, unsigned int queue_size,
					 struct sv_balloon_counters *counters, int *error);

// Ask the driver for statistics: sv_ring_notify_fd is readable when they have come.
// -ENOTCONN: the driver has no queue for them.
int sv_balloon_ask(struct sv_ring_device *device);

void sv_balloon_take(struct sv_ring_device *device, struct sv_balloon_news *news);

// The data plane of a worker: guest memory, queues with a thread each, block requests.
//
// Control calls come from one thread (Python's, the GIL released); each running queue has a
// thread of its own that nobody waits for but sv_queue_stop.
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "blk/blk.h"
#include "uring/engine.h"
#include "virtq/inflight.h"
#include "virtq/memory.h"
#include "virtq/virtq.h"

struct sv_plane;

// `disk` is copied. `counters`: one a queue, zeroed, valid until sv_plane_destroy.
// NULL with *error = negative errno: no memory, no descriptors, or no io_uring.
struct sv_plane *sv_plane_create(const struct sv_disk *disk, unsigned int queues,
				 unsigned int queue_size, enum sv_engine_kind engine,
				 struct sv_blk_counters *counters, int *error);
// Stops what still runs.
void sv_plane_destroy(struct sv_plane *plane);

// Regions are added and removed while no queue runs (-EBUSY).
int sv_plane_add_region(struct sv_plane *plane, uint64_t guest_addr, uint64_t size,
			uint64_t offset, int fd);
int sv_plane_remove_region(struct sv_plane *plane, uint64_t guest_addr, uint64_t size);
int sv_plane_clear_regions(struct sv_plane *plane);

// Whether completed writes may still be in a cache (else each is made durable). Turning it
// off syncs what was written before.
int sv_plane_set_writeback(struct sv_plane *plane, bool writeback);

// fdatasync of the image, on this thread.
int sv_plane_sync(struct sv_plane *plane);

// Map the in-flight region for all queues: [offset, offset + size) of `fd`, `queues` records
// for rings of `queue_size`. fd -1: forget it. No queue runs (-EBUSY).
int sv_plane_set_inflight(struct sv_plane *plane, int fd, uint64_t offset, uint64_t size,
			  unsigned int queues, unsigned int queue_size);

struct sv_ring_setup {
	unsigned int size;
	uint64_t desc, avail, used; // guest-physical
	uint64_t features;          // acknowledged by the driver
	uint16_t base;
	int kick_fd;                // stays the caller's, open while the ring runs; -1: poll
	int call_fd, err_fd;        // duplicated; -1: none
};

// Start the queue's thread. -EINVAL: the ring does not hold; -EBADMSG: the in-flight record
// does not; -EBUSY: it runs.
int sv_queue_start(struct sv_plane *plane, unsigned int index, const struct sv_ring_setup *setup);

// Finish what is in flight, end the thread; the next available index, or -EINVAL: it does
// not run. When it returns nothing touches guest memory for this queue any more.
int sv_queue_stop(struct sv_plane *plane, unsigned int index);

// Another call descriptor (duplicated; -1: none) for a queue that may run.
int sv_queue_set_call(struct sv_plane *plane, unsigned int index, int fd);

// Why the queue is broken, NULL if it isn't. Static text.
const char *sv_queue_broken(struct sv_plane *plane, unsigned int index);

// The image has `size` bytes now: what the guest may reach, at any time.
int sv_plane_resize(struct sv_plane *plane, uint64_t size);

// Requests that the host failed, by SV_BLK_READ to SV_BLK_ZERO, and the errno of the last one.
// `event_fd` (borrowed; -1: none) is signalled for each; no queue runs when it is set (-EBUSY).
uint64_t sv_plane_failures(const struct sv_plane *plane, unsigned int type, int *error);
int sv_plane_watch_failures(struct sv_plane *plane, int event_fd);

// Limits on requests and bytes a second, for all queues together; at any time. -EINVAL: absurd.
// A queue that is being stopped starts what its limits hold back (one request at most).
int sv_plane_set_limits(struct sv_plane *plane, const struct sv_limits *limits);

// What idle threads do before they sleep: look for work for at most so many nanoseconds, if
// work usually comes that soon. 0: sleep at once. For measurements; set before start.
void sv_plane_set_poll(struct sv_plane *plane, uint64_t limit_ns);

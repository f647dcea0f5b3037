// A split virtqueue (virtio 1.2, 2.7), device side. Knows nothing of devices or threads.
//
// The guest may change any byte of rings and descriptors at any time: each field is read once,
// into a local, checked there and used from there. A violation makes the queue `broken`: it
// serves nothing more until it is set up again. One thread uses a queue at a time.
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include <linux/virtio_ring.h>

#include "virtq/inflight.h"
#include "virtq/memory.h"

#define SV_VIRTQ_MAX_SIZE 1024
// The longest chain that is walked: a driver may not make one longer than its queue
// (2.7.5.3.1), and iovecs beyond this many no system call takes.
#define SV_CHAIN_MAX 1024

struct sv_virtq {
	const struct sv_memory *memory;
	struct vring_desc *desc;
	struct vring_avail *avail;
	struct vring_used *used;
	uint16_t *avail_event; // at the end of `used`
	uint16_t size;
	bool event_idx;
	bool indirect;
	bool broken;
	bool signalled_valid;   // the driver was asked once whether it wants a call
	uint16_t last_avail;    // next entry of the available ring to take
	uint16_t avail_seen;    // the guest's index when last read
	uint16_t used_idx;      // next entry of the used ring to fill
	uint16_t used_published;
	uint16_t signalled;     // used index when it was last asked
	uint16_t batch_head;    // heads completed and not yet published, linked in `inflight`
	uint16_t resubmit_count;
	uint16_t resubmit_next;
	uint64_t counter;       // order of requests in `inflight`
	const char *reason;     // why it is broken
	struct sv_inflight_queue *inflight; // NULL if the front end does not track
	uint64_t busy[SV_VIRTQ_MAX_SIZE / 64]; // heads taken and not yet given back
	uint16_t resubmit[SV_VIRTQ_MAX_SIZE];  // heads that an earlier back end left undone
	uint16_t completed[SV_VIRTQ_MAX_SIZE]; // heads pushed since the last publish
};

// One request of the driver: `out` (device-readable) buffers first in `iov`, then `in`.
struct sv_chain {
	uint16_t head;
	uint16_t out_count;
	uint16_t in_count;
	uint64_t out_bytes;
	uint64_t in_bytes;
	struct iovec iov[SV_CHAIN_MAX];
};

// Addresses are guest-physical. -EINVAL: size, alignment or addresses wrong.
// `base` is the first available entry to take; with `inflight` the record decides instead.
int sv_virtq_start(struct sv_virtq *vq, const struct sv_memory *memory, unsigned int size,
		   uint64_t desc, uint64_t avail, uint64_t used, uint64_t features,
		   uint16_t base, struct sv_inflight_queue *inflight);

// Everything taken was given back: the in-flight record starts afresh, and the driver kicks for
// the next entry.
void sv_virtq_stop(struct sv_virtq *vq);

// Entries the driver has made available and nobody has taken (what was in flight included).
unsigned int sv_virtq_pending(struct sv_virtq *vq);

// Take the next chain. 1: taken; 0: none; -EBADMSG: the queue is broken now.
int sv_virtq_pop(struct sv_virtq *vq, struct sv_chain *chain);

// Bring what the next chain begins with into this processor's cache, while there is other work to
// do: the driver has just written it on another one. Only a hint: nothing that is read counts.
void sv_virtq_prefetch(const struct sv_virtq *vq);

// Take the last pop back: the chain is available again. Only without in-flight tracking, and
// in the reverse order of the pops, with no push of a later chain between.
void sv_virtq_unpop(struct sv_virtq *vq, uint16_t head);

// The driver did what only this kind of device knows to be wrong. `reason`: static text.
void sv_virtq_break(struct sv_virtq *vq, const char *reason);

// Give a chain back with `written` bytes written; the driver sees it after publish.
void sv_virtq_push(struct sv_virtq *vq, uint16_t head, uint32_t written);
void sv_virtq_publish(struct sv_virtq *vq);

// Whether the driver wants a call for what was published since the last one.
bool sv_virtq_wants_call(struct sv_virtq *vq);

// Ask the driver for kicks; true if something came meanwhile (then serve it, don't sleep).
bool sv_virtq_enable_kicks(struct sv_virtq *vq);
// Tell the driver that kicks are not needed now.
void sv_virtq_disable_kicks(struct sv_virtq *vq);

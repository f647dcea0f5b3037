// The in-flight region of vhost-user ("Inflight I/O tracking", split virtqueue): what a back
// end that starts anew must do again. Shared with the front end: every field is checked when
// it is read, none is trusted while running.
#pragma once

#include <stddef.h>
#include <stdint.h>

#define SV_INFLIGHT_VERSION 1
#define SV_INFLIGHT_ALIGN 64

struct sv_inflight_desc {
	uint8_t inflight;
	uint8_t padding[5];
	uint16_t next;
	uint64_t counter;
};

struct sv_inflight_queue {
	uint64_t features;
	uint16_t version;
	uint16_t desc_num;
	uint16_t last_batch_head;
	uint16_t used_idx;
	struct sv_inflight_desc desc[];
};

// Bytes that one queue of `size` descriptors takes in the region.
size_t sv_inflight_size(unsigned int size);

// Bring the record of a queue in line with the guest's used index, and list in `heads` (room
// for `size`) what was in flight, oldest first. A region full of zeroes is set up.
// Returns how many; -EBADMSG: the record contradicts itself.
int sv_inflight_recover(struct sv_inflight_queue *queue, unsigned int size, uint16_t used_idx,
			uint16_t *heads);

// Between the files of native/balloon only.
#pragma once

#include "balloon/balloon.h"

#define PAGE_SHIFT 12 // the balloon's pages, whatever the host's or the guest's are
#define PAGE 4096ull
// A batch: the other queues, and `stop`, wait for its end.
#define BATCH_PFNS 1024
#define BATCH_BYTES (64ull << 20)

// The chain of a queue that is being worked off, if one batch was not enough for it.
struct work {
	bool held;
	unsigned int iov; // where it goes on,
	size_t offset;    // and in that buffer
	uint32_t left;    // page frame numbers to come
	struct sv_chain chain;
};

// Which pages of a region with huge pages are in the balloon: the host takes whole ones only.
struct collection {
	uint64_t guest_addr, size, page_size; // of the region that it belongs to
	uint64_t *bits;                       // a page of the balloon each, from the mapping's start
	uint32_t *counts;                     // of bits that are set, a huge page each
};

struct balloon {
	struct work work[SV_BALLOON_QUEUES];
	uint32_t pfns[BATCH_PFNS];
	struct collection collections[SV_MEMORY_MAX_REGIONS];
	bool keep;   // nothing goes back to the host
	bool wanted; // somebody waits for statistics,
	bool asked;  // the driver was given its buffer back to fill it
	int complained; // errno that was told
	struct sv_balloon_news news;
};

static inline struct sv_balloon_counters *counters_of(struct sv_ring_device *device,
						      unsigned int index)
{
	return (struct sv_balloon_counters *)device->queues[index].counters;
}

// The next bytes of the device-readable buffers; how many there were.
size_t sv_balloon_read(struct work *work, void *to, size_t len);

// A queue's chain was taken: what it holds.
void sv_balloon_begin(struct sv_ring_device *device, unsigned int index);
// One batch of it. True: there is no more.
bool sv_balloon_pfns(struct sv_ring_device *device, unsigned int index, bool inflate);
bool sv_balloon_ranges(struct sv_ring_device *device, unsigned int index);

// No page is in the balloon any more, or nobody knows.
void sv_balloon_forget(struct balloon *balloon);
// These pages of a region with huge pages come into the balloon: every huge page that is in it
// as a whole now goes back to the host.
void sv_balloon_collect(struct sv_ring_device *device, unsigned int index,
			const struct sv_region *region, uint8_t *host, uint64_t len);
void sv_balloon_uncollect(struct sv_ring_device *device, const struct sv_region *region,
			  uint8_t *host, uint64_t len);
// Give whole pages of the region back to the host.
void sv_balloon_remove(struct sv_ring_device *device, unsigned int index, void *host, uint64_t len);

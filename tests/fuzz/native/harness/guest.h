// Guest memory and the driver's side of its rings.
//
// Each region lies in a heap block of exactly its size, so that the sanitizer sees every byte
// beside it. What the device may write is more exact still: used rings, and writable buffers of
// chains that it has taken. An epoch is the time that the device has the memory for itself: what
// changes in it beyond that is found at its end.
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "virtq/virtq.h"

#define GUEST_PAGE 4096
#define GUEST_BUFFERS 0x900 // above the rings of most devices, at their first places

struct guest_region {
	uint64_t at, size;
};

struct guest_ring {
	unsigned int size;
	uint64_t desc, avail, used;
	unsigned int next; // descriptor that the driver takes next
};

enum { GUEST_WRITE_NONE, GUEST_WRITE_ALL, GUEST_WRITE_LAST };

// Fills `memory` with blocks for these regions, from the input's front.
void guest_make(struct sv_memory *memory, const struct guest_region *regions, unsigned int count,
		const uint8_t *data, size_t size);
void guest_free(void);

// The host address of guest bytes that one region holds, or NULL.
uint8_t *guest_at(uint64_t addr, uint64_t size);
// Whether these host bytes lie in guest memory.
bool guest_owns(const void *host, uint64_t size);

// The device may write these from now on, until the next epoch.
void guest_allow(const void *host, uint64_t size);
void guest_allow_ring(const struct guest_ring *ring);
void guest_epoch_begin(void);
void guest_epoch_end(void);

// ---- what a driver does, honest or not; the tape decides -----------------------------------------

// Change some bytes.
void guest_scribble(void);
// Change many bytes, and most of them back: for when the device runs at the same time.
void guest_storm(void);
// An address and a length of a buffer.
uint64_t guest_address(void);
uint32_t guest_length(void);
// Where a ring may lie that is not at its first place.
struct guest_ring guest_ring_place(void);
// Where it lies at first: 0x100 bytes for each.
struct guest_ring guest_ring_first(unsigned int index);
// Make a chain of these buffers available (the first `readable` ones device-readable).
struct guest_buffer {
	uint64_t addr;
	uint32_t len;
};
void guest_add(struct guest_ring *ring, const struct guest_buffer *buffers, unsigned int count,
	       unsigned int readable, bool indirect);
// A chain of buffers that the tape chooses: readable ones, writable ones, or both.
void guest_add_any(struct guest_ring *ring, int writable);

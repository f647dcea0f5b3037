// The table of guest memory: which guest addresses are mapped where in this process.
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// vhost-user: CONFIGURE_MEM_SLOTS lets a front end add regions one by one; this many at most.
#define SV_MEMORY_MAX_REGIONS 64

struct sv_region {
	uint64_t guest_addr;
	uint64_t size;
	uint8_t *host;      // where guest_addr is in this process
	void *mapping;      // what was mapped: page aligned, at or below host
	size_t mapping_size;
	uint64_t page_size; // of the mapping: huge pages have their own
};

// Ring threads read the table without a lock: adding publishes a finished entry through
// `count`, removing is done only while no ring thread runs (native/dataplane/plane.c).
struct sv_memory {
	unsigned int count;
	struct sv_region regions[SV_MEMORY_MAX_REGIONS];
};

// Map [offset, offset + size) of `fd`. The descriptor stays the caller's.
// -EINVAL: empty, wraps around, overlaps a region, or passes the end of the file;
// -ENOSPC: the table is full.
int sv_memory_add(struct sv_memory *memory, uint64_t guest_addr, uint64_t size, uint64_t offset,
		  int fd);

// Unmap the region with exactly these values. -ENOENT: there is none.
int sv_memory_remove(struct sv_memory *memory, uint64_t guest_addr, uint64_t size);

// Unmap everything.
void sv_memory_clear(struct sv_memory *memory);

// The host address of guest address `addr`, and in `*contiguous` how many bytes follow it in
// its region (at most `size`). NULL: not in the table.
static inline void *sv_memory_guest(const struct sv_memory *memory, uint64_t addr, uint64_t size,
				    uint64_t *contiguous)
{
	unsigned int count = __atomic_load_n(&memory->count, __ATOMIC_ACQUIRE);

	for (unsigned int i = 0; i < count; i++) {
		const struct sv_region *r = &memory->regions[i];
		uint64_t offset = addr - r->guest_addr;

		// Wraps to a huge offset when addr is below the region.
		if (offset >= r->size)
			continue;
		*contiguous = size < r->size - offset ? size : r->size - offset;
		return r->host + offset;
	}
	return NULL;
}

// The host address of [addr, addr + size) if one region holds all of it, else NULL.
void *sv_memory_range(const struct sv_memory *memory, uint64_t addr, uint64_t size);

#include "virtq/memory.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static bool overlaps(uint64_t a, uint64_t b, uint64_t a_size, uint64_t b_size)
{
	return a < b + b_size && b < a + a_size;
}

static int check_region(const struct sv_memory *memory, uint64_t guest_addr, uint64_t size,
			uint64_t offset, int fd)
{
	struct stat st;
	uint64_t end;

	if (!size || __builtin_add_overflow(guest_addr, size, &end) ||
	    __builtin_add_overflow(offset, size, &end))
		return -EINVAL;
	if (end > INT64_MAX)
		return -EINVAL;
	// A mapping beyond the end of the file would be a SIGBUS waiting for a guest address.
	if (fstat(fd, &st) < 0)
		return -errno;
	if (S_ISREG(st.st_mode) && end > (uint64_t)st.st_size)
		return -EINVAL;
	for (unsigned int i = 0; i < memory->count; i++) {
		const struct sv_region *r = &memory->regions[i];

		if (overlaps(guest_addr, r->guest_addr, size, r->size))
			return -EINVAL;
	}
	return memory->count == SV_MEMORY_MAX_REGIONS ? -ENOSPC : 0;
}

int sv_memory_add(struct sv_memory *memory, uint64_t guest_addr, uint64_t size, uint64_t offset,
		  int fd)
{
	uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
	uint64_t slack = offset & (page - 1);
	struct sv_region *region;
	void *mapping;
	int ret;

	ret = check_region(memory, guest_addr, size, offset, fd);
	if (ret < 0)
		return ret;
	mapping = mmap(NULL, size + slack, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd,
		       (off_t)(offset - slack));
	if (mapping == MAP_FAILED)
		return -errno;
	// Guest RAM is not ours to put into a core dump.
	madvise(mapping, size + slack, MADV_DONTDUMP);
	region = &memory->regions[memory->count];
	*region = (struct sv_region){
		.guest_addr = guest_addr,
		.size = size,
		.host = (uint8_t *)mapping + slack,
		.mapping = mapping,
		.mapping_size = size + slack,
	};
	// The entry before the count that makes ring threads look at it.
	__atomic_store_n(&memory->count, memory->count + 1, __ATOMIC_RELEASE);
	return 0;
}

int sv_memory_remove(struct sv_memory *memory, uint64_t guest_addr, uint64_t size)
{
	for (unsigned int i = 0; i < memory->count; i++) {
		struct sv_region *r = &memory->regions[i];

		if (r->guest_addr != guest_addr || r->size != size)
			continue;
		munmap(r->mapping, r->mapping_size);
		*r = memory->regions[memory->count - 1];
		memory->count--;
		return 0;
	}
	return -ENOENT;
}

void sv_memory_clear(struct sv_memory *memory)
{
	for (unsigned int i = 0; i < memory->count; i++)
		munmap(memory->regions[i].mapping, memory->regions[i].mapping_size);
	memory->count = 0;
}

void *sv_memory_guest(const struct sv_memory *memory, uint64_t addr, uint64_t size,
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

void *sv_memory_range(const struct sv_memory *memory, uint64_t addr, uint64_t size)
{
	uint64_t contiguous;
	void *host = sv_memory_guest(memory, addr, size, &contiguous);

	return host && contiguous == size ? host : NULL;
}

#include "virtq/memory.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <linux/magic.h>

static bool overlaps(uint64_t a, uint64_t b, uint64_t a_size, uint64_t b_size)
{
	return a < b + b_size && b < a + a_size;
}

// What offsets and lengths of mappings must be multiples of: huge pages have their own.
static uint64_t mapping_unit(int fd)
{
	struct statfs fs;

	if (fstatfs(fd, &fs) == 0 && fs.f_type == HUGETLBFS_MAGIC && fs.f_bsize > 0)
		return (uint64_t)fs.f_bsize;
	return (uint64_t)sysconf(_SC_PAGESIZE);
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
	uint64_t unit = mapping_unit(fd);
	uint64_t slack = offset & (unit - 1);
	uint64_t length = (size + slack + unit - 1) & ~(unit - 1);
	struct sv_region *region;
	void *mapping;
	int ret;

	ret = check_region(memory, guest_addr, size, offset, fd);
	if (ret < 0)
		return ret;
	mapping = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd,
		       (off_t)(offset - slack));
	if (mapping == MAP_FAILED)
		return -errno;
	// Guest RAM is not ours to put into a core dump.
	madvise(mapping, length, MADV_DONTDUMP);
	region = &memory->regions[memory->count];
	*region = (struct sv_region){
		.guest_addr = guest_addr,
		.size = size,
		.host = (uint8_t *)mapping + slack,
		.mapping = mapping,
		.mapping_size = length,
		.page_size = unit,
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

void *sv_memory_range(const struct sv_memory *memory, uint64_t addr, uint64_t size)
{
	uint64_t contiguous;
	void *host = sv_memory_guest(memory, addr, size, &contiguous);

	return host && contiguous == size ? host : NULL;
}

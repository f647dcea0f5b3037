// Guest RAM: a sealed memfd or a file, mapped once; populated without the GIL.
#include "core/core.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/vfs.h>
#include <unistd.h>

#define CHUNK (64ul << 20)

int sv_memory_memfd(const char *name, uint64_t size, uint64_t huge_page_size)
{
	unsigned int flags = MFD_CLOEXEC | MFD_ALLOW_SEALING;
	int fd, ret;

	if (huge_page_size)
		flags |= MFD_HUGETLB |
			 (unsigned int)__builtin_ctzl(huge_page_size) << MAP_HUGE_SHIFT;
	fd = memfd_create(name, flags);

	if (fd < 0)
		return -errno;
	// Never F_SEAL_WRITE: the guest writes, and the balloon punches holes.
	if (ftruncate(fd, (off_t)size) < 0 ||
	    fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0) {
		ret = -errno;
		close(fd);
		return ret;
	}
	return fd;
}

int sv_memory_lock(int fd)
{
	return flock(fd, LOCK_EX | LOCK_NB) < 0 ? -errno : 0;
}

int64_t sv_memory_page_size(int fd)
{
	struct statfs info;

	if (fstatfs(fd, &info) < 0)
		return -errno;
	return info.f_type == HUGETLBFS_MAGIC ? (int64_t)info.f_bsize : sysconf(_SC_PAGESIZE);
}

int sv_memory_map(int fd, uint64_t size, uint64_t page_size, int dump, struct sv_mapping *mapping)
{
	uint64_t align = page_size > SV_HUGE_PAGE ? page_size : SV_HUGE_PAGE;
	// Huge pages are reserved: running out of them must fail here, not kill us later.
	int flags = MAP_SHARED | MAP_FIXED | (page_size > 4096 ? 0 : MAP_NORESERVE);
	uint64_t reserved_size, start;
	void *reserved, *mapped;

	if (__builtin_add_overflow(size, 3 * align, &reserved_size))
		return -EINVAL;
	reserved = mmap(NULL, reserved_size, PROT_NONE,
			MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (reserved == MAP_FAILED)
		return -errno;
	// Equal alignment of host and guest addresses lets KVM use huge pages; what stays of the
	// reservation on both sides turns an overrun into a fault.
	start = ((uint64_t)reserved + align) & ~(align - 1);
	mapped = mmap((void *)start, size, PROT_READ | PROT_WRITE, flags, fd, 0);
	if (mapped == MAP_FAILED) {
		int ret = -errno;

		munmap(reserved, reserved_size);
		return ret;
	}
	if (!dump)
		madvise(mapped, size, MADV_DONTDUMP);
	if (page_size <= 4096)
		madvise(mapped, size, MADV_HUGEPAGE); // pays where the host says "advise"
	mapping->address = start;
	mapping->size = size;
	mapping->reserved_address = (uint64_t)reserved;
	mapping->reserved_size = reserved_size;
	return 0;
}

void sv_memory_unmap(struct sv_mapping *mapping)
{
	if (mapping->reserved_size)
		munmap((void *)mapping->reserved_address, mapping->reserved_size);
	memset(mapping, 0, sizeof(*mapping));
}

struct populate {
	uint64_t address, end, page_size;
	bool huge; // it is worth trying
	_Atomic uint64_t next;
	_Atomic int error;
};

static int populate_chunk(const struct populate *job, uint64_t address, uint64_t length)
{
	// Whatever can't be huge, at the end or where the host has no more, gets small pages.
	if (job->huge)
		sv_huge_collapse(address, address + (length & -SV_HUGE_PAGE));
	if (madvise((void *)address, length, MADV_POPULATE_WRITE) == 0)
		return 0;
	if (errno != EINVAL)
		return -errno;
	// Linux before 5.14: touch every page without changing it.
	for (uint64_t at = address; at < address + length; at += job->page_size)
		__atomic_fetch_or((uint8_t *)at, 0, __ATOMIC_RELAXED);
	return 0;
}

static void *populate_thread(void *argument)
{
	struct populate *job = argument;

	while (!atomic_load(&job->error)) {
		uint64_t at = atomic_fetch_add(&job->next, CHUNK);
		int ret;

		if (at >= job->end)
			break;
		ret = populate_chunk(job, at, job->end - at < CHUNK ? job->end - at : CHUNK);
		if (ret)
			atomic_store(&job->error, ret);
	}
	return NULL;
}

int sv_memory_populate(struct sv_mapping *mapping, uint64_t page_size, uint32_t threads)
{
	struct populate job = {
		.end = mapping->address + mapping->size,
		.page_size = page_size,
		.huge = page_size == 4096 && sv_huge_is_wanted(),
		.next = mapping->address,
	};
	pthread_t started[64];
	uint32_t count = 0;

	// This thread is one of them; if no other can be had it does all.
	while (count + 1 < threads && count < 64 &&
	       pthread_create(&started[count], NULL, populate_thread, &job) == 0)
		count++;
	populate_thread(&job);
	while (count)
		pthread_join(started[--count], NULL);
	return atomic_load(&job.error);
}

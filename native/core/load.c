// Kernel and initrd into guest RAM, on a thread of its own: Python builds devices meanwhile.
#include "core/core.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <unistd.h>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25 // Linux 6.1
#endif

struct job {
	struct sv_piece piece;
	bool huge; // it goes into huge pages
};

struct sv_load {
	pthread_t thread;
	int memory_fd;
	uint64_t page_size;
	struct sv_mapping mapping;
	uint32_t count;
	uint32_t done;
	int error;
	struct job jobs[];
};

// Huge pages for [start, end): to allocate shared memory page by page takes longer than to copy
// the kernel there. The host's shmem_enabled is about huge pages that nobody asked for;
// MADV_COLLAPSE asks. It takes an extent without a single page for a hole, so each gets one
// first, by a call that can fail where a touch would kill.
static bool collapse(struct sv_load *load, uint64_t start, uint64_t end)
{
	for (uint64_t at = start; at < end; at += SV_HUGE_PAGE)
		if (fallocate(load->memory_fd, FALLOC_FL_KEEP_SIZE,
			      (off_t)(at - load->mapping.address), 4096) < 0)
			return false;
	return madvise((void *)start, end - start, MADV_COLLAPSE) == 0;
}

// What lies around the pieces from `first` on, as far as they follow each other: one call waits
// for the other processors once. Returns the number of the next piece.
static uint32_t make_huge(struct sv_load *load, uint32_t first)
{
	uint64_t limit = (load->mapping.address + load->mapping.size) & -SV_HUGE_PAGE;
	uint64_t start = load->jobs[first].piece.address & -SV_HUGE_PAGE, end = start, total = 0;
	uint32_t next;

	for (next = first; next < load->count; next++) {
		const struct sv_piece *piece = &load->jobs[next].piece;
		uint64_t to = (piece->address + piece->length + SV_HUGE_PAGE - 1) & -SV_HUGE_PAGE;

		if (piece->address < start || piece->address >= end + SV_HUGE_PAGE)
			break;
		end = to > end ? to : end;
		total += piece->length;
	}
	if (end > limit)
		end = limit;
	if (load->page_size == 4096 && total >= SV_HUGE_PAGE / 2 && start < end &&
	    collapse(load, start, end))
		for (uint32_t at = first; at < next; at++)
			load->jobs[at].huge = true;
	return next;
}

// Into pages that are there; or for file systems that have no write(), hugetlbfs above all.
static int load_by_read(uint64_t address, int fd, uint64_t offset, uint64_t length)
{
	while (length) {
		ssize_t n = pread(fd, (void *)address, length, (off_t)offset);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		if (n == 0)
			return -ENODATA;
		address += (uint64_t)n;
		offset += (uint64_t)n;
		length -= (uint64_t)n;
	}
	return 0;
}

// Into pages that are not: without a page fault for each, and without zeroing it first.
static int load_by_sendfile(struct sv_load *load, const struct sv_piece *piece)
{
	off_t from = (off_t)piece->offset;
	uint64_t done = 0;

	if (lseek(load->memory_fd, (off_t)(piece->address - load->mapping.address), SEEK_SET) < 0)
		return -errno;
	while (done < piece->length) {
		ssize_t n = sendfile(load->memory_fd, piece->fd, &from, piece->length - done);

		if (n > 0)
			done += (uint64_t)n;
		else if (n == 0)
			return -ENODATA;
		else if (errno == EINVAL || errno == ENOSYS)
			return load_by_read(piece->address + done, piece->fd, piece->offset + done,
					    piece->length - done);
		else if (errno != EINTR)
			return -errno;
	}
	return 0;
}

static int load_piece(struct sv_load *load, const struct job *job)
{
	const struct sv_piece *piece = &job->piece;
	int ret;

	if (job->huge)
		ret = load_by_read(piece->address, piece->fd, piece->offset, piece->length);
	else
		ret = load_by_sendfile(load, piece);
	if (!ret)
		memset((void *)(piece->address + piece->length), 0, piece->zeroes);
	return ret;
}

static void *run_load(void *argument)
{
	struct sv_load *load = argument;

	for (uint32_t next = 0; next < load->count;)
		next = make_huge(load, next);
	for (; load->done < load->count && !load->error; load->done += !load->error)
		load->error = load_piece(load, &load->jobs[load->done]);
	return NULL;
}

int sv_load_start(int memory_fd, uint64_t page_size, const struct sv_mapping *mapping,
		  const struct sv_piece *pieces, uint32_t count, struct sv_load **out)
{
	struct sv_load *load = calloc(1, sizeof(*load) + count * sizeof(*load->jobs));
	int ret;

	if (!load)
		return -ENOMEM;
	load->memory_fd = memory_fd;
	load->page_size = page_size;
	load->mapping = *mapping;
	load->count = count;
	for (uint32_t i = 0; i < count; i++)
		load->jobs[i].piece = pieces[i];
	ret = pthread_create(&load->thread, NULL, run_load, load);
	if (ret) {
		free(load);
		return -ret;
	}
	*out = load;
	return 0;
}

int sv_load_wait(struct sv_load *load, uint32_t *failed)
{
	int error;

	pthread_join(load->thread, NULL);
	*failed = load->done;
	error = load->error;
	free(load);
	return error;
}

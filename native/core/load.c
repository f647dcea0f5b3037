// Kernel and initrd into guest RAM, on threads of their own: Python builds devices meanwhile.
#include "core/core.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <unistd.h>

#define PART SV_HUGE_PAGE

struct job {
	struct sv_piece piece;
	bool huge; // it goes into huge pages, which are there
};

struct sv_load {
	pthread_t thread;
	int memory_fd;
	uint64_t page_size;
	struct sv_mapping mapping;
	uint32_t count;
	_Atomic uint32_t next_part; // of the pieces that go into huge pages
	pthread_mutex_t lock;       // of what follows
	pthread_cond_t changed;
	bool has_parts; // it is known which pieces those are
	uint32_t failed; // the first one
	int error;
	struct job jobs[];
};

// Huge pages for the pieces from `first` on, as far as they follow each other: to allocate shared
// memory page by page takes longer than to copy the kernel there. One call for all of them, for it
// waits for the other processors once. Returns the number of the next piece.
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
	    sv_huge_collapse(start, end))
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

static void fail(struct sv_load *load, uint32_t job, int error)
{
	pthread_mutex_lock(&load->lock);
	if (!load->error) {
		load->error = error;
		load->failed = job;
	}
	pthread_mutex_unlock(&load->lock);
}

// Copies parts until there are no more, for as many threads as there are.
static void *copy_parts(void *argument)
{
	struct sv_load *load = argument;

	while (true) {
		uint64_t part = atomic_fetch_add(&load->next_part, 1);
		const struct sv_piece *piece = NULL;
		uint64_t offset, length;
		uint32_t job;
		int ret;

		for (job = 0; job < load->count; job++) {
			uint64_t parts = (load->jobs[job].piece.length + PART - 1) / PART;

			if (!load->jobs[job].huge)
				continue;
			piece = &load->jobs[job].piece;
			if (part < parts)
				break;
			part -= parts;
		}
		if (job == load->count)
			return NULL;
		offset = part * PART;
		length = piece->length - offset < PART ? piece->length - offset : PART;
		ret = load_by_read(piece->address + offset, piece->fd, piece->offset + offset,
				   length);
		if (ret)
			fail(load, job, ret);
	}
}

// On two processors a second thread of ours would only wait for the one that builds devices; that
// one helps when it has nothing else to do (sv_load_wait()).
static bool has_processors(void)
{
	cpu_set_t set;

	return sched_getaffinity(0, sizeof(set), &set) < 0 || CPU_COUNT(&set) > 2;
}

static void *run_load(void *argument)
{
	struct sv_load *load = argument;
	bool huge = false, two = false;
	pthread_t second;

	for (uint32_t next = 0; next < load->count;)
		next = make_huge(load, next);
	for (uint32_t job = 0; job < load->count; job++)
		huge |= load->jobs[job].huge;
	pthread_mutex_lock(&load->lock);
	load->has_parts = true;
	pthread_cond_signal(&load->changed);
	pthread_mutex_unlock(&load->lock);
	if (huge && has_processors())
		two = pthread_create(&second, NULL, copy_parts, load) == 0;
	copy_parts(load);
	if (two)
		pthread_join(second, NULL);
	for (uint32_t job = 0; job < load->count && !load->error; job++) {
		const struct sv_piece *piece = &load->jobs[job].piece;
		int ret = load->jobs[job].huge ? 0 : load_by_sendfile(load, piece);

		if (ret)
			fail(load, job, ret);
		else
			memset((void *)(piece->address + piece->length), 0, piece->zeroes);
	}
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
	pthread_mutex_init(&load->lock, NULL);
	pthread_cond_init(&load->changed, NULL);
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

	pthread_mutex_lock(&load->lock);
	while (!load->has_parts)
		pthread_cond_wait(&load->changed, &load->lock);
	pthread_mutex_unlock(&load->lock);
	copy_parts(load);
	pthread_join(load->thread, NULL);
	*failed = load->failed;
	error = load->error;
	free(load);
	return error;
}

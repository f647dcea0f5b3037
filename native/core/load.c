// Kernel and initrd into guest RAM, on threads of their own: Python builds devices meanwhile.
#include "core/core.h"

#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <unistd.h>

#define UNIT (4 * SV_HUGE_PAGE)
#define STEP (512u << 10) // of a copy, before others that wait for the processor have it
#define HEAP_RESERVE (2 << 20)
#define HEAP_STEP (100 << 10) // twice this is more than there ever is; once has no mapping of its own

struct job {
	struct sv_piece piece;
	bool huge; // it goes into huge pages, in units
};

// Huge pages, and whatever of the pieces lies in them.
struct unit {
	uint64_t start;
	uint64_t end;
};

struct sv_load {
	pthread_t thread;
	int memory_fd;
	int starter; // processor of who started this
	uint64_t page_size;
	struct sv_mapping mapping;
	uint32_t count;
	struct unit *units;
	uint32_t unit_count;
	_Atomic uint32_t next_unit;
	pthread_mutex_t lock; // of what follows
	pthread_cond_t changed;
	bool is_ready;   // to be helped
	uint32_t failed; // the first one
	int error;
	struct job jobs[];
};

// End of the huge pages that RAM has room for.
static uint64_t limit_of(const struct sv_load *load)
{
	return (load->mapping.address + load->mapping.size) & -SV_HUGE_PAGE;
}

// One call for several, as each waits until the other processors have done something.
static bool make_huge(const struct sv_load *load, const struct unit *unit)
{
	uint64_t limit = limit_of(load);
	uint64_t end = (unit->end + SV_HUGE_PAGE - 1) & -SV_HUGE_PAGE;

	end = end < limit ? end : limit;
	return unit->start < end && sv_huge_collapse(unit->start, end);
}

// Huge pages for the pieces from `first` on, as far as they follow each other: to allocate shared
// memory page by page takes longer than to copy the kernel there. Returns the next piece.
static uint32_t plan_run(struct sv_load *load, uint32_t first)
{
	uint64_t start = load->jobs[first].piece.address & -SV_HUGE_PAGE, end = start, total = 0;
	uint32_t next;

	for (next = first; next < load->count; next++) {
		const struct sv_piece *piece = &load->jobs[next].piece;
		uint64_t to = piece->address + piece->length;

		if (piece->address < start || piece->address >= end + 2 * SV_HUGE_PAGE - 1)
			break;
		end = to > end ? to : end;
		total += piece->length;
	}
	if (load->page_size != 4096 || total < SV_HUGE_PAGE / 2 || start >= limit_of(load))
		return next;
	for (uint32_t at = first; at < next; at++)
		load->jobs[at].huge = true;
	for (uint64_t at = start; at < end; at += UNIT)
		load->units[load->unit_count++] =
			(struct unit){at, end - at < UNIT ? end : at + UNIT};
	return next;
}

// What plan_run() makes of so many pieces at most.
static size_t units_of(const struct sv_piece *pieces, uint32_t count)
{
	size_t most = 0;

	for (uint32_t i = 0; i < count; i++)
		most += (size_t)(pieces[i].length / UNIT) + 3;
	return most;
}

// Into pages that are there; or for file systems that have no write(), hugetlbfs above all. Step by
// step: who makes the VM meanwhile waits for the kernel again and again, and would then wait for
// this thread's slice of time to end, for milliseconds, though it goes on for microseconds only.
static int load_by_read(uint64_t address, int fd, uint64_t offset, uint64_t length)
{
	while (length) {
		ssize_t n = pread(fd, (void *)address, length < STEP ? length : STEP, (off_t)offset);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		if (n == 0)
			return -ENODATA;
		address += (uint64_t)n;
		offset += (uint64_t)n;
		length -= (uint64_t)n;
		sched_yield();
	}
	return 0;
}

// RAM with a position of its own: sendfile() writes where that is, and huge.c moves the one that
// all others share, at any time. -1: there is no /proc.
static int open_again(int fd)
{
	char path[32];

	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	return open(path, O_WRONLY | O_CLOEXEC);
}

static int send_piece(const struct sv_load *load, const struct sv_piece *piece, int memory_fd)
{
	off_t from = (off_t)piece->offset;
	uint64_t done = 0;

	if (lseek(memory_fd, (off_t)(piece->address - load->mapping.address), SEEK_SET) < 0)
		return -errno;
	while (done < piece->length) {
		ssize_t n = sendfile(memory_fd, piece->fd, &from, piece->length - done);

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

// Into pages that are not: without a page fault for each, and without zeroing it first.
static int load_by_sendfile(const struct sv_load *load, const struct sv_piece *piece)
{
	int memory_fd = open_again(load->memory_fd);
	int ret;

	if (memory_fd < 0)
		return load_by_read(piece->address, piece->fd, piece->offset, piece->length);
	ret = send_piece(load, piece, memory_fd);
	close(memory_fd);
	return ret;
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

static void copy_unit(struct sv_load *load, const struct unit *unit)
{
	for (uint32_t job = 0; job < load->count; job++) {
		const struct sv_piece *piece = &load->jobs[job].piece;
		uint64_t from = piece->address, to = piece->address + piece->length;
		int ret;

		from = from < unit->start ? unit->start : from;
		to = to > unit->end ? unit->end : to;
		if (!load->jobs[job].huge || from >= to)
			continue;
		ret = load_by_read(from, piece->fd, piece->offset + (from - piece->address),
				   to - from);
		if (ret)
			fail(load, job, ret);
	}
}

// For as many threads as there are. Where there are no huge pages any more small ones come, one by
// one.
static void *work(void *argument)
{
	struct sv_load *load = argument;
	uint32_t at;

	while ((at = atomic_fetch_add(&load->next_unit, 1)) < load->unit_count) {
		if (at) // else it is
			make_huge(load, &load->units[at]);
		copy_unit(load, &load->units[at]);
	}
	return NULL;
}

// On two processors this thread has the other one from the first, though it may not be idle yet:
// beside who started it one of the two would wait for a slice of time. False: a second thread would
// only be in the way of who builds devices; that one helps when it has nothing else to do
// (sv_load_wait()).
static bool share_processors(const struct sv_load *load)
{
	cpu_set_t set;

	if (sched_getaffinity(0, sizeof(set), &set) < 0 || CPU_COUNT(&set) > 2)
		return true;
	if (CPU_COUNT(&set) == 2 && load->starter >= 0) {
		CPU_CLR(load->starter, &set);
		if (CPU_COUNT(&set) == 1)
			sched_setaffinity(0, sizeof(set), &set);
	}
	return false;
}

// Whether this host can do it shows the first unit.
static bool can_be_huge(struct sv_load *load)
{
	if (!load->unit_count || make_huge(load, &load->units[0]))
		return load->unit_count;
	load->unit_count = 0;
	for (uint32_t job = 0; job < load->count; job++)
		load->jobs[job].huge = false;
	return false;
}

static void *run_load(void *argument)
{
	struct sv_load *load = argument;
	bool are_many = share_processors(load), two = false;
	pthread_t second;

	for (uint32_t next = 0; next < load->count;)
		next = plan_run(load, next);
	if (can_be_huge(load) && are_many)
		two = pthread_create(&second, NULL, work, load) == 0;
	pthread_mutex_lock(&load->lock);
	load->is_ready = true;
	pthread_cond_signal(&load->changed);
	pthread_mutex_unlock(&load->lock);
	work(load);
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

static void free_load(struct sv_load *load)
{
	pthread_cond_destroy(&load->changed);
	pthread_mutex_destroy(&load->lock);
	free(load->units);
	free(load);
}

// Who makes huge pages keeps the address space from being changed, for milliseconds if the other
// processors are busy, and the heap from growing. So it grows now; nothing of that is touched.
static void reserve_heap(void)
{
	void *first, *second;

	mallopt(M_TOP_PAD, HEAP_RESERVE);
	first = malloc(HEAP_STEP);
	second = malloc(HEAP_STEP);
	__asm__ volatile("" : : "r"(first), "r"(second)); // or the compiler leaves them out
	free(first);
	free(second);
}

int sv_load_start(int memory_fd, uint64_t page_size, const struct sv_mapping *mapping,
		  const struct sv_piece *pieces, uint32_t count, struct sv_load **out)
{
	struct sv_load *load = calloc(1, sizeof(*load) + count * sizeof(*load->jobs));
	int ret;

	if (!load)
		return -ENOMEM;
	load->units = calloc(units_of(pieces, count), sizeof(*load->units));
	if (!load->units && count) {
		free(load);
		return -ENOMEM;
	}
	load->memory_fd = memory_fd;
	load->starter = sched_getcpu();
	load->page_size = page_size;
	load->mapping = *mapping;
	load->count = count;
	pthread_mutex_init(&load->lock, NULL);
	pthread_cond_init(&load->changed, NULL);
	for (uint32_t i = 0; i < count; i++)
		load->jobs[i].piece = pieces[i];
	reserve_heap();
	ret = pthread_create(&load->thread, NULL, run_load, load);
	if (ret) {
		free_load(load);
		return -ret;
	}
	*out = load;
	return 0;
}

int sv_load_wait(struct sv_load *load, uint32_t *failed)
{
	int error;

	pthread_mutex_lock(&load->lock);
	while (!load->is_ready)
		pthread_cond_wait(&load->changed, &load->lock);
	pthread_mutex_unlock(&load->lock);
	work(load);
	pthread_join(load->thread, NULL);
	*failed = load->failed;
	error = load->error;
	free_load(load);
	return error;
}

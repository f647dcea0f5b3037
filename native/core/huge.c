// Guest RAM in huge pages, as the guest begins to use it: a thread does for the memfd what the
// kernel's khugepaged does for private memory. The host's shmem_enabled is "never" by default,
// and a guest whose RAM is in pages of 4 KiB pays for each with an exit, and then with two levels
// more of every page walk.
#include "core/core.h"
#include "include/clock.h"
#include "include/thread.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25 // Linux 6.1
#endif

#define ENABLED "/sys/kernel/mm/transparent_hugepage/enabled"
#define FIRST_LOOK 4000000ull    // ns; then twice as long each time
#define GROWING 100000000ull     // between two looks at a guest that takes memory, at most
#define LONGEST 1000000000ull    // at one that doesn't
#define NONE_FREE 10000000000ull // after the host had no huge page
#define SOON 2000000000ull       // a guest that never stops growing is seen to after that long
#define AGAIN 100000000ull       // after a page was in use; then twice as long each time,
#define TRIES 8                  // so often
#define GROWTH (64ull << 12)     // bytes that count
#define SHARE 10                 // scans take this part of the time at most

struct sv_huge {
	pthread_t thread;
	int fd;
	struct sv_mapping mapping;
	uint64_t least;
	struct sv_ahead ahead[SV_MAX_AHEAD];
	uint32_t ahead_count;
	bool capabilities, calls;
	_Atomic bool held;
	_Atomic uint64_t made;
	pthread_mutex_t lock; // of stopping
	pthread_cond_t wake;
	bool stopping;
	// The rest is the thread's.
	uint64_t seen;    // bytes of RAM that were there at the last look
	uint64_t scanned; // and after the last scan
	bool shrunk;      // some of it was given back since then
	bool busy;        // an extent can't become huge just now: a page of it is in use
	unsigned int tries; // scans in a row that found such a one
	uint64_t count;   // of extents: whole ones alone
	uint64_t done[];  // a bit each: was made huge, and not given back since
};

bool sv_huge_is_wanted(void)
{
	char text[64] = "";
	int fd = open(ENABLED, O_RDONLY | O_CLOEXEC);
	ssize_t length;

	if (fd < 0)
		return false;
	length = read(fd, text, sizeof(text) - 1);
	close(fd);
	return length > 0 && !strstr(text, "[never]");
}

bool sv_huge_collapse(uint64_t start, uint64_t end)
{
	for (uint64_t at = start; at < end; at += SV_HUGE_PAGE)
		if (madvise((void *)at, 4096, MADV_POPULATE_WRITE) < 0)
			return false;
	return madvise((void *)start, end - start, MADV_COLLAPSE) == 0;
}

static bool is_done(const struct sv_huge *huge, uint64_t extent)
{
	return huge->done[extent / 64] >> extent % 64 & 1;
}

// First extent from `from` on that isn't done.
static uint64_t next_undone(const struct sv_huge *huge, uint64_t from)
{
	while (from < huge->count) {
		uint64_t left = ~huge->done[from / 64] >> from % 64;

		if (left)
			return from + (uint64_t)__builtin_ctzll(left);
		from = (from / 64 + 1) * 64;
	}
	return from;
}

// Offset of the first page from `offset` on that is there, past the end if there is none. The
// position of a descriptor that others share is moved, which nobody uses.
static uint64_t next_page(const struct sv_huge *huge, uint64_t offset)
{
	off_t found = lseek(huge->fd, (off_t)offset, SEEK_DATA);

	return found < 0 ? huge->mapping.size : (uint64_t)found;
}

// An extent that the guest gave back as a whole is as one that it never used. One that it gave
// back in part is not made huge again: it would get back what it gave.
static void forget_returned(struct sv_huge *huge)
{
	for (uint64_t extent = 0; extent < huge->count; extent++)
		if (is_done(huge, extent) &&
		    next_page(huge, extent * SV_HUGE_PAGE) >= (extent + 1) * SV_HUGE_PAGE)
			huge->done[extent / 64] &= ~(1ull << extent % 64);
	huge->shrunk = false;
}

// 0: go on. An extent that a device is just using can't become huge now; nor can one whose pages
// another processor has just touched, sometimes.
static int collapse(struct sv_huge *huge, uint64_t extent)
{
	uint64_t start = huge->mapping.address + extent * SV_HUGE_PAGE;

	if (!sv_huge_collapse(start, start + SV_HUGE_PAGE)) {
		// EINVAL of a kernel that could do it before is about this extent: among others that
		// the guest was giving pages of it back.
		bool later = errno == EAGAIN || errno == EBUSY ||
			     (errno == EINVAL && atomic_load(&huge->made));

		huge->busy |= later;
		return later ? 0 : -errno;
	}
	huge->done[extent / 64] |= 1ull << extent % 64;
	atomic_fetch_add(&huge->made, 1);
	return 0;
}

// What a guest has begun to use becomes huge; 0, or why no more can be had now.
static int scan(struct sv_huge *huge)
{
	uint64_t extent = 0;
	int ret = 0;

	if (huge->shrunk)
		forget_returned(huge);
	while (!ret && (extent = next_undone(huge, extent)) < huge->count &&
	       !atomic_load(&huge->held)) {
		uint64_t page = next_page(huge, extent * SV_HUGE_PAGE);

		if (page / SV_HUGE_PAGE > extent)
			extent = page / SV_HUGE_PAGE;
		else
			ret = collapse(huge, extent++);
	}
	return ret;
}

static uint64_t bytes_there(const struct sv_huge *huge)
{
	struct stat info;

	return fstat(huge->fd, &info) < 0 ? 0 : (uint64_t)info.st_blocks * 512;
}

// Remember how much is there. True: some was given back.
static bool note_size(struct sv_huge *huge, uint64_t there)
{
	bool shrinks = there < huge->seen;

	huge->shrunk |= shrinks;
	huge->seen = there;
	return shrinks;
}

// What it will use first, before it does: nothing need be copied, and no processor be told. What a
// guest has just given back looks as if it had never been used; one that does so needs nothing.
static int go_ahead(struct sv_huge *huge)
{
	for (uint32_t i = 0; i < huge->ahead_count; i++) {
		const struct sv_ahead *ahead = &huge->ahead[i];
		uint64_t extent = ahead->offset / SV_HUGE_PAGE;

		for (uint32_t n = 0; n < ahead->count && extent < huge->count; n++) {
			uint64_t page = extent * SV_HUGE_PAGE;
			int ret = 0;

			if (note_size(huge, bytes_there(huge)))
				return 0;
			if (!is_done(huge, extent) && !atomic_load(&huge->held) &&
			    next_page(huge, page) >= page + SV_HUGE_PAGE)
				ret = collapse(huge, extent);
			if (ret)
				return ret;
			extent += ahead->down ? -1ull : 1ull; // below 0 it is out of bounds too
		}
	}
	return 0;
}

// False: it is time to end.
static bool pause_for(struct sv_huge *huge, uint64_t ns)
{
	struct timespec at = sv_in_ns(ns);
	bool stopping;

	pthread_mutex_lock(&huge->lock);
	while (!huge->stopping &&
	       pthread_cond_clockwait(&huge->wake, &huge->lock, CLOCK_MONOTONIC, &at) == 0)
		;
	stopping = huge->stopping;
	pthread_mutex_unlock(&huge->lock);
	return !stopping;
}

// To make huge what the guest is just filling costs it more than it gains: every page is copied,
// every processor told. So it is done when the guest has stopped taking memory.
static bool is_time(struct sv_huge *huge, uint64_t there, uint64_t since_scan)
{
	bool growing = there >= huge->seen + GROWTH;
	bool changed, again;

	note_size(huge, there);
	changed = huge->shrunk || there >= huge->scanned + GROWTH;
	huge->tries = changed ? 0 : huge->tries;
	again = huge->tries && huge->tries <= TRIES && since_scan > AGAIN << (huge->tries - 1);
	return (changed || again) && there >= huge->least && (!growing || since_scan > SOON) &&
	       !atomic_load(&huge->held);
}

static void *watch(void *argument)
{
	struct sv_huge *huge = argument;
	uint64_t wait = FIRST_LOOK, last_scan = sv_now_ns();
	bool ahead = false;
	int ret = 0;

	prctl(PR_SET_NAME, "sv-huge-pages");
	// As khugepaged: whatever else the VM does is more urgent, its first worker's start above all.
	setpriority(PRIO_PROCESS, (id_t)sv_thread_id(), 19);
	if (!sv_huge_is_wanted() || sv_huge_confine(huge->capabilities, huge->calls) < 0)
		return NULL;
	do {
		uint64_t there = bytes_there(huge), began = sv_now_ns();

		wait = wait * 2 < LONGEST ? wait * 2 : LONGEST;
		if (there >= huge->seen + GROWTH && wait > GROWING)
			wait = GROWING;
		if (!ahead && there >= huge->least) {
			ahead = true;
			ret = go_ahead(huge);
			huge->seen = bytes_there(huge);
		} else if (is_time(huge, there, began - last_scan)) {
			ret = scan(huge);
			last_scan = sv_now_ns();
			huge->seen = bytes_there(huge);
			if (!ret && !atomic_load(&huge->held)) // else there is more to do
				huge->scanned = huge->seen;
			huge->tries = huge->busy ? huge->tries + 1 : 0;
			huge->busy = false;
			if (wait < (last_scan - began) * SHARE)
				wait = (last_scan - began) * SHARE;
		}
		if (ret == -ENOMEM)
			wait = NONE_FREE;
		else if (ret)
			return NULL; // this kernel can't, or the host forbids it
		ret = 0;
	} while (pause_for(huge, wait));
	return NULL;
}

int sv_huge_start(int fd, const struct sv_mapping *mapping, uint64_t least,
		  const struct sv_ahead *ahead, uint32_t ahead_count, bool capabilities, bool calls,
		  struct sv_huge **out)
{
	uint64_t count = mapping->size / SV_HUGE_PAGE;
	struct sv_huge *huge;
	int ret;

	if (ahead_count > SV_MAX_AHEAD)
		return -EINVAL;
	huge = calloc(1, sizeof(*huge) + (count / 64 + 1) * sizeof(*huge->done));
	if (!huge)
		return -ENOMEM;
	huge->fd = fd;
	huge->mapping = *mapping;
	huge->least = least;
	memcpy(huge->ahead, ahead, ahead_count * sizeof(*ahead));
	huge->ahead_count = ahead_count;
	huge->capabilities = capabilities;
	huge->calls = calls;
	huge->count = count;
	pthread_mutex_init(&huge->lock, NULL);
	pthread_cond_init(&huge->wake, NULL);
	ret = sv_thread_start(&huge->thread, watch, huge);
	if (ret) {
		free(huge);
		return ret;
	}
	*out = huge;
	return 0;
}

void sv_huge_hold(struct sv_huge *huge, bool held)
{
	atomic_store(&huge->held, held);
}

uint64_t sv_huge_made(struct sv_huge *huge)
{
	return atomic_load(&huge->made);
}

void sv_huge_stop(struct sv_huge *huge)
{
	if (!huge)
		return;
	sv_huge_hold(huge, true); // or a scan under way went on to its end, in a large guest for seconds
	pthread_mutex_lock(&huge->lock);
	huge->stopping = true;
	pthread_cond_signal(&huge->wake);
	pthread_mutex_unlock(&huge->lock);
	pthread_join(huge->thread, NULL);
	pthread_cond_destroy(&huge->wake);
	pthread_mutex_destroy(&huge->lock);
	free(huge);
}

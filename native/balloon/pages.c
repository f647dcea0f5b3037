// Page frame numbers and ranges, as the driver names them, to pages of the mapping.
#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "balloon/internal.h"

void sv_balloon_remove(struct sv_ring_device *device, unsigned int index, void *host, uint64_t len)
{
	struct sv_balloon_counters *counters = counters_of(device, index);
	struct balloon *balloon = device->own;

	if (balloon->keep)
		return;
	counters->removals++;
	if (madvise(host, len, MADV_REMOVE) == 0) {
		counters->removed_bytes += len;
		return;
	}
	counters->failed_bytes += len;
	// Once for each reason: a file system that can't do it fails thousands a second.
	if (errno == balloon->complained)
		return;
	balloon->complained = balloon->news.error = errno;
	sv_ring_notify(device);
}

size_t sv_balloon_read(struct work *work, void *to, size_t len)
{
	size_t done = 0;

	while (done < len && work->iov < work->chain.out_count) {
		const struct iovec *iov = &work->chain.iov[work->iov];
		size_t piece = iov->iov_len - work->offset;

		if (piece > len - done)
			piece = len - done;
		memcpy((uint8_t *)to + done, (uint8_t *)iov->iov_base + work->offset, piece);
		done += piece;
		work->offset += piece;
		if (work->offset == iov->iov_len) {
			work->iov++;
			work->offset = 0;
		}
	}
	return done;
}

void sv_balloon_begin(struct sv_ring_device *device, unsigned int index)
{
	struct work *work = &((struct balloon *)device->own)->work[index];
	uint64_t count = work->chain.out_bytes / sizeof(uint32_t);

	work->held = true;
	work->iov = 0;
	work->offset = 0;
	work->left = count < SV_BALLOON_MAX_PFNS ? (uint32_t)count : SV_BALLOON_MAX_PFNS;
}

static void sift(uint32_t *heap, unsigned int root, unsigned int count)
{
	uint32_t value = heap[root];

	for (;;) {
		unsigned int child = 2 * root + 1;

		if (child >= count)
			break;
		if (child + 1 < count && heap[child + 1] > heap[child])
			child++;
		if (heap[child] <= value)
			break;
		heap[root] = heap[child];
		root = child;
	}
	heap[root] = value;
}

// By hand: qsort may ask the system for memory, and how much there is.
static void sort(uint32_t *values, unsigned int count)
{
	unsigned int sorted = 1;

	while (sorted < count && values[sorted - 1] <= values[sorted])
		sorted++;
	if (sorted >= count)
		return;
	for (unsigned int i = count / 2; i-- > 0;)
		sift(values, i, count);
	for (unsigned int end = count - 1; end > 0; end--) {
		uint32_t largest = values[0];

		values[0] = values[end];
		values[end] = largest;
		sift(values, 0, end);
	}
}

static const struct sv_region *find_guest(const struct sv_memory *memory, uint64_t addr)
{
	for (unsigned int i = 0; i < memory->count; i++) {
		if (addr - memory->regions[i].guest_addr < memory->regions[i].size)
			return &memory->regions[i];
	}
	return NULL;
}

static const struct sv_region *find_host(const struct sv_memory *memory, const uint8_t *host)
{
	for (unsigned int i = 0; i < memory->count; i++) {
		if ((uintptr_t)host - (uintptr_t)memory->regions[i].host < memory->regions[i].size)
			return &memory->regions[i];
	}
	return NULL;
}

// Pages of one region, adjacent ones.
static void change(struct sv_ring_device *device, unsigned int index,
		   const struct sv_region *region, uint8_t *host, uint64_t len, bool inflate)
{
	struct sv_balloon_counters *counters = counters_of(device, index);

	if (!inflate) {
		counters->deflated_pages += len >> PAGE_SHIFT;
		if (region->page_size > PAGE)
			sv_balloon_uncollect(device, region, host, len);
		return;
	}
	counters->inflated_pages += len >> PAGE_SHIFT;
	if (region->page_size > PAGE)
		sv_balloon_collect(device, index, region, host, len);
	else
		sv_balloon_remove(device, index, host, len);
}

// Adjacent pages, of any region or none.
static void change_run(struct sv_ring_device *device, unsigned int index, uint64_t addr,
		       uint64_t len, bool inflate)
{
	while (len) {
		const struct sv_region *region = find_guest(&device->memory, addr);
		uint64_t offset = region ? addr - region->guest_addr : 0;
		uint64_t piece = region ? (region->size - offset) & ~(PAGE - 1) : 0;

		if (piece > len)
			piece = len;
		// A page that isn't RAM as a whole, or no page of the mapping.
		if (!piece || ((uintptr_t)(region->host + offset) & (PAGE - 1))) {
			counters_of(device, index)->refused_pages++;
			addr += PAGE;
			len -= PAGE;
			continue;
		}
		change(device, index, region, region->host + offset, piece, inflate);
		addr += piece;
		len -= piece;
	}
}

bool sv_balloon_pfns(struct sv_ring_device *device, unsigned int index, bool inflate)
{
	struct balloon *balloon = device->own;
	struct work *work = &balloon->work[index];
	uint32_t *pfns = balloon->pfns;
	unsigned int count = work->left < BATCH_PFNS ? work->left : BATCH_PFNS;
	unsigned int i = 0;

	sv_balloon_read(work, pfns, count * sizeof(*pfns));
	work->left -= count;
	sort(pfns, count);
	while (i < count) {
		uint64_t first = pfns[i], next = first + 1;

		// What is named twice counts once.
		for (i++; i < count && pfns[i] <= next; i++)
			next = (uint64_t)pfns[i] + 1;
		change_run(device, index, first << PAGE_SHIFT, (next - first) << PAGE_SHIFT,
			   inflate);
	}
	if (work->left)
		return false;
	if (work->chain.out_bytes / sizeof(*pfns) > SV_BALLOON_MAX_PFNS)
		counters_of(device, index)->refused_pages +=
			work->chain.out_bytes / sizeof(*pfns) - SV_BALLOON_MAX_PFNS;
	counters_of(device, index)->refused_pages += work->chain.out_bytes % sizeof(*pfns) != 0;
	return true;
}

bool sv_balloon_ranges(struct sv_ring_device *device, unsigned int index)
{
	struct work *work = &((struct balloon *)device->own)->work[index];
	const struct sv_chain *chain = &work->chain;
	uint64_t budget = BATCH_BYTES;

	for (; work->iov < chain->in_count; work->iov++, work->offset = 0) {
		const struct iovec *iov = &chain->iov[chain->out_count + work->iov];
		uintptr_t begin = (uintptr_t)iov->iov_base, end = begin + iov->iov_len;
		const struct sv_region *region = find_host(&device->memory, iov->iov_base);
		uint64_t unit = region ? region->page_size : PAGE;
		uint64_t len;

		if (!budget)
			return false;
		if (!work->offset)
			counters_of(device, index)->reported_pages += iov->iov_len >> PAGE_SHIFT;
		// Only whole pages of the host: what else they hold wasn't reported.
		begin = ((begin + unit - 1) & ~(unit - 1)) + work->offset;
		end &= ~(unit - 1);
		if (begin >= end)
			continue;
		len = budget > unit ? budget & ~(unit - 1) : unit;
		if (len > end - begin)
			len = end - begin;
		sv_balloon_remove(device, index, (void *)begin, len);
		budget -= len < budget ? len : budget;
		work->offset += len;
		if (begin + len < end)
			return false;
	}
	return true;
}

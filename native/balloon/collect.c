// Guest memory in huge pages: the driver gives pages of 4 KiB, the host takes huge ones only.
//
// So what is in the balloon is kept, a bit a page.  That is right only with a driver that tells
// before it takes a page back (MUST_TELL_HOST), since each of a huge page's pages is its last
// word on that page.  A worker that follows another one knows of no page: less is given back then,
// never too much.
#include <stdlib.h>

#include <linux/virtio_balloon.h>

#include "balloon/internal.h"

static void drop(struct collection *collection)
{
	free(collection->bits);
	free(collection->counts);
	*collection = (struct collection){0};
}

void sv_balloon_forget(struct balloon *balloon)
{
	for (unsigned int i = 0; i < SV_MEMORY_MAX_REGIONS; i++)
		drop(&balloon->collections[i]);
}

// The region's collection, made if need be; NULL: there is no memory for it.
static struct collection *find(struct sv_ring_device *device, const struct sv_region *region,
			       bool make)
{
	struct balloon *balloon = device->own;
	struct collection *found = &balloon->collections[region - device->memory.regions];

	if (found->bits && found->guest_addr == region->guest_addr &&
	    found->size == region->size && found->page_size == region->page_size)
		return found;
	drop(found);
	if (!make)
		return NULL;
	found->bits = calloc(region->mapping_size / PAGE / 64 + 1, sizeof(*found->bits));
	found->counts = calloc(region->mapping_size / region->page_size, sizeof(*found->counts));
	if (!found->bits || !found->counts) {
		drop(found);
		return NULL;
	}
	found->guest_addr = region->guest_addr;
	found->size = region->size;
	found->page_size = region->page_size;
	return found;
}

void sv_balloon_collect(struct sv_ring_device *device, unsigned int index,
			const struct sv_region *region, uint8_t *host, uint64_t len)
{
	struct collection *collection;
	uint64_t at = (uint64_t)(host - (uint8_t *)region->mapping);

	if (!(device->features & 1ull << VIRTIO_BALLOON_F_MUST_TELL_HOST))
		return;
	collection = find(device, region, true);
	if (!collection)
		return;
	for (uint64_t end = at + len; at < end; at += PAGE) {
		uint64_t page = at / PAGE, huge = at / region->page_size;

		if (collection->bits[page / 64] & 1ull << page % 64)
			continue;
		collection->bits[page / 64] |= 1ull << page % 64;
		if (++collection->counts[huge] == region->page_size / PAGE)
			sv_balloon_remove(device, index,
					  (uint8_t *)region->mapping + huge * region->page_size,
					  region->page_size);
	}
}

void sv_balloon_uncollect(struct sv_ring_device *device, const struct sv_region *region,
			  uint8_t *host, uint64_t len)
{
	struct collection *collection = find(device, region, false);
	uint64_t at = (uint64_t)(host - (uint8_t *)region->mapping);

	if (!collection)
		return;
	for (uint64_t end = at + len; at < end; at += PAGE) {
		uint64_t page = at / PAGE;

		if (!(collection->bits[page / 64] & 1ull << page % 64))
			continue;
		collection->bits[page / 64] &= ~(1ull << page % 64);
		collection->counts[at / region->page_size]--;
	}
}

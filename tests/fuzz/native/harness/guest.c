#include "guest.h"

#include <malloc.h>
#include <string.h>

#include "tape.h"

#define MAX_REGIONS 8
#define GUEST_ALIGN 8192 // as if mapped, in pages that may be huge ones
#define MAX_ALLOWED 4096
#define MAX_BUFFERS 640 // of which some are two: more than a chain may have
#define TABLE 0x800 // of indirect descriptors

const uint8_t *fuzz_tape;
size_t fuzz_tape_left;

static struct {
	uint64_t at, size;
	uint8_t *host, *before; // `before`: as it was when the epoch began
} blocks[MAX_REGIONS];
static unsigned int block_count;

static struct iovec allowed[MAX_ALLOWED];
static unsigned int allowed_count;
static bool in_epoch;

void guest_make(struct sv_memory *memory, const struct guest_region *regions, unsigned int count,
		const uint8_t *data, size_t size)
{
	block_count = count;
	allowed_count = 0;
	in_epoch = false;
	for (unsigned int i = 0; i < count; i++) {
		size_t part = size < regions[i].size ? size : regions[i].size;
		size_t align = regions[i].size < GUEST_PAGE ? 16 : GUEST_ALIGN;

		blocks[i].at = regions[i].at;
		blocks[i].size = regions[i].size;
		// Not aligned_alloc: the size may be no multiple.
		blocks[i].host = memalign(align, regions[i].size);
		blocks[i].before = malloc(regions[i].size);
		memset(blocks[i].host, 0, regions[i].size);
		memcpy(blocks[i].host, data, part);
		data += part;
		size -= part;
		memory->regions[memory->count++] = (struct sv_region){
			.guest_addr = regions[i].at,
			.size = regions[i].size,
			.host = blocks[i].host,
		};
	}
}

void guest_free(void)
{
	for (unsigned int i = 0; i < block_count; i++) {
		free(blocks[i].host);
		free(blocks[i].before);
	}
	block_count = 0;
}

uint8_t *guest_at(uint64_t addr, uint64_t size)
{
	for (unsigned int i = 0; i < block_count; i++) {
		uint64_t offset = addr - blocks[i].at;

		if (offset < blocks[i].size && size <= blocks[i].size - offset)
			return blocks[i].host + offset;
	}
	return NULL;
}

bool guest_owns(const void *host, uint64_t size)
{
	for (unsigned int i = 0; i < block_count; i++) {
		uint64_t offset = (uint64_t)((uintptr_t)host - (uintptr_t)blocks[i].host);

		if (offset < blocks[i].size && size <= blocks[i].size - offset)
			return true;
	}
	return false;
}

void guest_allow(const void *host, uint64_t size)
{
	if (!in_epoch)
		return;
	if (allowed_count == MAX_ALLOWED) {
		in_epoch = false; // too many to tell: this epoch isn't checked
		return;
	}
	allowed[allowed_count++] = (struct iovec){(void *)host, size};
}

void guest_allow_ring(const struct guest_ring *ring)
{
	uint64_t bytes = 6 + 8 * (uint64_t)ring->size;
	uint8_t *used = guest_at(ring->used, bytes);

	if (used)
		guest_allow(used, bytes);
}

void guest_epoch_begin(void)
{
	for (unsigned int i = 0; i < block_count; i++)
		memcpy(blocks[i].before, blocks[i].host, blocks[i].size);
	allowed_count = 0;
	in_epoch = true;
}

void guest_epoch_end(void)
{
	if (!in_epoch)
		return;
	in_epoch = false;
	for (unsigned int i = 0; i < block_count; i++) {
		for (unsigned int j = 0; j < allowed_count; j++) {
			uint64_t offset = (uint64_t)((uintptr_t)allowed[j].iov_base -
						     (uintptr_t)blocks[i].host);

			if (offset < blocks[i].size)
				memcpy(blocks[i].before + offset, allowed[j].iov_base,
				       allowed[j].iov_len);
		}
		CHECK(!memcmp(blocks[i].before, blocks[i].host, blocks[i].size));
	}
}

void guest_scribble(void)
{
	for (unsigned int count = 1 + next_byte() % 4; count; count--) {
		uint8_t *host = guest_at(next_short(), 2);
		uint8_t low = next_byte(), high = next_byte();

		if (host) {
			host[0] = low;
			host[1] = high;
		}
	}
}

void guest_storm(void)
{
	uint32_t state = 1u + next_byte();
	uint32_t reach = next_byte() & 1 ? 0x800 : 0x100;

	for (unsigned int i = 0; i < 4000; i++) {
		volatile uint8_t *byte;
		uint8_t was;

		state ^= state << 13;
		state ^= state >> 17;
		state ^= state << 5;
		byte = guest_at(state % reach, 1);
		was = *byte;
		*byte = (uint8_t)(state >> 24);
		if (state & 0x700)
			*byte = was;
	}
}

uint64_t guest_address(void)
{
	uint8_t kind = next_byte();

	switch (kind >> 4) {
	case 0xF: return next_short();
	case 0xE: return 0x2000 - (kind & 15); // into the next region
	case 0xD: return 0x10000 + 32u * (kind & 15);
	case 0xC: return 0x40u * (kind & 15); // onto rings
	case 0xB: return 0x3000 - (kind & 15); // beyond all of them
	default: return GUEST_BUFFERS + 0x20u * kind;
	}
}

uint32_t guest_length(void)
{
	static const uint32_t some[] = {1, 2, 4, 8, 11, 12, 13, 14, 26, 60, 76, 128, 256, 512,
					1024, 1526, 2048, 4096, 8192, 0, 0xFFFFFFFF, 0x80000000};
	uint8_t kind = next_byte();

	if (kind >= 0xE0)
		return next_short();
	return kind < 0xC0 ? some[kind % 17] : some[kind % (sizeof(some) / sizeof(*some))];
}

struct guest_ring guest_ring_first(unsigned int index)
{
	uint64_t at = 0x100u * index;

	return (struct guest_ring){8, at, at + 0x80, at + 0xA0, 0};
}

struct guest_ring guest_ring_place(void)
{
	struct guest_ring ring = {1u << next_byte() % 8, 0, 0, 0, 0};
	uint8_t kind = next_byte();

	ring.desc = 0x40u * next_byte() + (kind & 0x80 ? kind & 15 : 0);
	switch (kind & 3) {
	case 0: // as a driver would
		ring.avail = ring.desc + 16 * ring.size;
		ring.used = (ring.avail + 6 + 2 * ring.size + 7) & ~7ull;
		break;
	case 1: // one upon the other
		ring.avail = ring.desc + next_byte();
		ring.used = ring.desc + 4u * next_byte();
		break;
	default:
		ring.avail = 2u * next_short() / 4;
		ring.used = next_short();
	}
	return ring;
}

static void put(uint64_t addr, const void *data, uint64_t size)
{
	uint8_t *host = guest_at(addr, size);

	if (host)
		memcpy(host, data, size);
}

void guest_add(struct guest_ring *ring, const struct guest_buffer *buffers, unsigned int count,
	       unsigned int readable, bool indirect)
{
	uint8_t *index_at = guest_at(ring->avail + 2, 2);
	uint64_t table = indirect ? TABLE : ring->desc;
	uint16_t head = (uint16_t)(ring->next % ring->size), index;

	if (!index_at)
		return;
	if (indirect) {
		struct vring_desc desc = {TABLE, 16 * count, VRING_DESC_F_INDIRECT, 0};

		put(ring->desc + 16u * head, &desc, sizeof(desc));
	}
	for (unsigned int i = 0; i < count; i++) {
		unsigned int at = indirect ? i : (head + i) % ring->size;
		unsigned int next = indirect ? i + 1 : (head + i + 1) % ring->size;
		struct vring_desc desc = {buffers[i].addr, buffers[i].len,
					  i < readable ? 0 : VRING_DESC_F_WRITE, (uint16_t)next};

		if (i + 1 < count)
			desc.flags |= VRING_DESC_F_NEXT;
		put(table + 16u * at, &desc, sizeof(desc));
	}
	ring->next += indirect ? 1 : count;
	memcpy(&index, index_at, sizeof(index));
	put(ring->avail + 4 + 2u * (index % ring->size), &head, sizeof(head));
	index++;
	memcpy(index_at, &index, sizeof(index));
}

void guest_add_any(struct guest_ring *ring, int writable)
{
	struct guest_buffer buffers[MAX_BUFFERS];
	uint8_t shape = next_byte();
	unsigned int count = 1 + shape % 4;
	unsigned int readable, step;

	if (shape >= 0xFC) // longer than the ring, and than what fits into one system call
		count = 8 + next_short() % (MAX_BUFFERS - 8);
	step = count < 5 ? 0 : next_byte();
	for (unsigned int i = 0; i < count; i++) {
		buffers[i] = buffers[0];
		buffers[i].addr += i * step;
		if (i && step)
			continue;
		buffers[i].addr = guest_address();
		buffers[i].len = guest_length();
	}
	readable = writable == GUEST_WRITE_ALL ? 0 : writable == GUEST_WRITE_LAST ? count - 1 : count;
	if ((shape & 0x70) == 0x70 && shape < 0xFC)
		readable = next_byte() % (count + 1);
	guest_add(ring, buffers, count, readable, shape & 0x80);
}

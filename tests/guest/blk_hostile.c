// blk.hostile DISK KIND: requests that no right driver makes. The answer tells what came back
// (status byte, used entries, device status); the host's test judges it. `blk.init` repairs.
#include "blk.h"

#define WAIT (1000 * NSEC_PER_MS)
#define NOWHERE 0x7fff00000000ull // no RAM there, whatever the guest's size

struct attack {
	struct disk *disk;
	struct queue *queue;
	struct desc *desc; // the table of queue 0: 0 header, 1 data, 2 status
	u16 head;
	u16 entries; // added to the available index
};

static void header(struct attack *a, u32 type, u64 sector)
{
	a->queue->header[0] = (struct header){ type, 0, sector };
}

// The chain of a right read of one sector, for the attack to spoil.
static void right_chain(struct attack *a)
{
	struct queue *queue = a->queue;

	header(a, T_IN, 0);
	queue->status[0] = S_NONE;
	a->desc[0] = (struct desc){ (u64)&queue->header[0], 16, D_NEXT, 1 };
	a->desc[1] = (struct desc){ (u64)data, SECTOR, D_NEXT | D_WRITE, 2 };
	a->desc[2] = (struct desc){ (u64)&queue->status[0], 1, D_WRITE, 0 };
}

static void none(struct attack *a) {}
static void loop(struct attack *a)
{
	a->desc[1].next = 0;
}
static void self_loop(struct attack *a) { a->desc[0].next = 0; }
static void long_loop(struct attack *a)
{
	for (u32 i = 0; i < a->queue->size; i++)
		a->desc[i] = (struct desc){ (u64)data, 16, D_NEXT, (u16)((i + 1) % a->queue->size) };
}
static void outside(struct attack *a) { a->desc[1].address = NOWHERE; }
static void outside_header(struct attack *a) { a->desc[0].address = NOWHERE; }
static void outside_status(struct attack *a) { a->desc[2].address = NOWHERE; }
static void wrapping(struct attack *a)
{
	a->desc[1].address = ~0ull - 255;
}
static void mmio_hole(struct attack *a) { a->desc[1].address = 0xfee00000; }
static void huge(struct attack *a) { a->desc[1].length = 0xffffffff; }
static void no_data(struct attack *a) { a->desc[1].length = 0; }
static void odd_length(struct attack *a) { a->desc[1].length = 511; }
static void bad_next(struct attack *a) { a->desc[1].next = 0xffff; }
static void bad_head(struct attack *a) { a->head = 0xffff; }
static void short_header(struct attack *a) { a->desc[0].length = 8; }
static void writable_header(struct attack *a) { a->desc[0].flags |= D_WRITE; }
static void readonly_status(struct attack *a) { a->desc[2].flags = 0; }
static void readonly_data(struct attack *a) { a->desc[1].flags = D_NEXT; }
static void empty_status(struct attack *a) { a->desc[2].length = 0; }
static void only_header(struct attack *a) { a->desc[0].flags = 0; }
static void bad_type(struct attack *a) { header(a, 0x1234, 0); }
static void beyond(struct attack *a) { header(a, T_IN, a->disk->capacity); }
static void far_beyond(struct attack *a) { header(a, T_IN, ~0ull); }
static void write_beyond(struct attack *a)
{
	header(a, T_OUT, a->disk->capacity);
	a->desc[1].flags = D_NEXT;
}
static void indirect(struct attack *a, u64 table, u32 length)
{
	a->desc[3] = (struct desc){ table, length, D_INDIRECT, 0 };
	a->head = 3;
}
static void indirect_outside(struct attack *a) { indirect(a, NOWHERE, 48); }
static void indirect_odd(struct attack *a) { indirect(a, (u64)a->desc, 47); }
static void indirect_empty(struct attack *a) { indirect(a, (u64)a->desc, 0); }
static void indirect_huge(struct attack *a) { indirect(a, (u64)a->desc, 0xfffffff0); }
static void indirect_next(struct attack *a)
{
	indirect(a, (u64)a->desc, 48);
	a->desc[3].flags |= D_NEXT;
}
static void indirect_nested(struct attack *a)
{
	indirect(a, (u64)a->desc, 48);
	a->desc[1] = (struct desc){ (u64)a->desc, 48, D_INDIRECT, 0 };
}
static void available_jump(struct attack *a) { a->entries = 0x7000; }
static void discard_short(struct attack *a)
{
	header(a, T_DISCARD, 0);
	a->desc[1] = (struct desc){ (u64)data, 15, D_NEXT, 2 };
}
static void discard_range(struct attack *a, u32 type, u64 sector, u32 count, u32 flags)
{
	u32 range[4] = { (u32)sector, (u32)(sector >> 32), count, flags };

	header(a, type, 0);
	memcpy(data, range, 16);
	a->desc[1] = (struct desc){ (u64)data, 16, D_NEXT, 2 };
}
static void discard_beyond(struct attack *a)
{
	discard_range(a, T_DISCARD, a->disk->capacity - 1, 2, 0);
}
static void discard_wrap(struct attack *a) { discard_range(a, T_DISCARD, ~0ull, 2, 0); }
static void discard_flags(struct attack *a) { discard_range(a, T_DISCARD, 0, 1, 0xfffffffe); }
static void zero_beyond(struct attack *a)
{
	discard_range(a, T_WRITE_ZEROES, a->disk->capacity, 1, 0);
}

static const struct {
	const char *name;
	void (*spoil)(struct attack *a);
} attacks[] = {
	{ "none", none },
	{ "loop", loop },
	{ "self-loop", self_loop },
	{ "long-loop", long_loop },
	{ "outside", outside },
	{ "outside-header", outside_header },
	{ "outside-status", outside_status },
	{ "wrapping", wrapping },
	{ "mmio-hole", mmio_hole },
	{ "huge", huge },
	{ "no-data", no_data },
	{ "odd-length", odd_length },
	{ "bad-next", bad_next },
	{ "bad-head", bad_head },
	{ "short-header", short_header },
	{ "writable-header", writable_header },
	{ "readonly-status", readonly_status },
	{ "readonly-data", readonly_data },
	{ "empty-status", empty_status },
	{ "only-header", only_header },
	{ "bad-type", bad_type },
	{ "beyond", beyond },
	{ "far-beyond", far_beyond },
	{ "write-beyond", write_beyond },
	{ "indirect-outside", indirect_outside },
	{ "indirect-odd", indirect_odd },
	{ "indirect-empty", indirect_empty },
	{ "indirect-huge", indirect_huge },
	{ "indirect-next", indirect_next },
	{ "indirect-nested", indirect_nested },
	{ "available-jump", available_jump },
	{ "discard-short", discard_short },
	{ "discard-beyond", discard_beyond },
	{ "discard-wrap", discard_wrap },
	{ "discard-flags", discard_flags },
	{ "zero-beyond", zero_beyond },
};

static void attack_run(struct attack *a, const char *name)
{
	volatile u64 *seen = &interrupt_count[VECTOR_GSI + a->disk->virtio.gsi], old = *seen;
	u64 deadline = clock_ns() + WAIT;
	volatile u16 *index = &a->queue->used.index;
	u16 before = *index;

	a->queue->avail.ring[a->queue->published % a->queue->size] = a->head;
	a->queue->published += a->entries;
	barrier();
	*(volatile u16 *)&a->queue->avail.index = a->queue->published;
	barrier();
	virtio_put(&a->disk->virtio, REG_NOTIFY, 0);
	while (*index == before && !(virtio_get(&a->disk->virtio, REG_STATUS) & STATUS_NEEDS_RESET) &&
	       wait_change(seen, old, deadline))
		;
	timer_stop();
	print("ok blk.hostile %s status=0x%x used=%u device=0x%x\n", name,
	      (u64)*(volatile u8 *)&a->queue->status[0], (u64)(u16)(*index - before),
	      (u64)virtio_get(&a->disk->virtio, REG_STATUS));
}

bool blk_hostile(u32 number, const char *kind)
{
	struct attack a = { &disks[number], disks[number].queue, disks[number].queue->desc, 0, 1 };

	for (u32 i = 0; i < ARRAY_SIZE(attacks); i++)
		if (!compare(attacks[i].name, kind)) {
			right_chain(&a);
			attacks[i].spoil(&a);
			attack_run(&a, kind);
			a.disk->virtio.ready = false; // the next command starts from a reset
			return true;
		}
	return false;
}

// net.hostile NIC KIND: chains that no right driver makes, on the queue that the kind begins with.
// The answer tells what came back (used entries, acknowledgement, device status); the host's test
// judges it. `net.init` repairs.
#include "net.h"

#define WAIT (1000 * NSEC_PER_MS)
#define NOWHERE 0x7fff00000000ull // no RAM there, whatever the guest's size
#define NO_BUFFERS (2 * RX_POOL)  // a receive queue without any

struct attack {
	struct nic *nic;
	struct net_queue *queue;
	struct desc *desc;
	u32 number;  // of the queue
	u16 head;
	u16 entries; // added to the available index
};

static u8 room[4096] __attribute__((aligned(16)));
static u8 command[2], ack;

static void send_chain(struct attack *a)
{
	struct net_batch batch = { 0xffeedd005452ull, a->nic->mac, 0, 1, 60 };
	u8 *buffer = a->queue->pool;

	run_user(user_net_fill, (u64)a->queue, (u64)&batch, 0, 0);
	a->queue->published--; // the attack publishes it
	a->desc[0] = (struct desc){ (u64)buffer, NET_HEADER, D_NEXT, 1 };
	a->desc[1] = (struct desc){ (u64)buffer + NET_HEADER, 60, 0, 0 };
}

static void receive_chain(struct attack *a)
{
	a->desc[0] = (struct desc){ (u64)room, 2000, D_WRITE, 0 };
	a->desc[1] = (struct desc){ (u64)room + 2000, 2000, D_WRITE, 0 };
}

static void control_chain(struct attack *a)
{
	command[0] = command[1] = 0; // VIRTIO_NET_CTRL_RX, promiscuous
	room[0] = 1;
	ack = S_NONE;
	a->desc[0] = (struct desc){ (u64)command, 2, D_NEXT, 1 };
	a->desc[1] = (struct desc){ (u64)room, 1, D_NEXT, 2 };
	a->desc[2] = (struct desc){ (u64)&ack, 1, D_WRITE, 0 };
}

static void none(struct attack *a) {}
static void loop(struct attack *a)
{
	a->desc[0].flags |= D_NEXT;
	a->desc[0].next = 1;
	a->desc[1].flags |= D_NEXT;
	a->desc[1].next = 0;
}
static void self_loop(struct attack *a)
{
	a->desc[0].flags |= D_NEXT;
	a->desc[0].next = 0;
}
static void outside(struct attack *a) { a->desc[0].address = NOWHERE; }
static void outside_second(struct attack *a)
{
	a->desc[0].flags |= D_NEXT;
	a->desc[0].next = 1;
	a->desc[1].address = NOWHERE;
}
static void wrapping(struct attack *a) { a->desc[0].address = ~0ull - 5; }
static void mmio_hole(struct attack *a) { a->desc[0].address = 0xfee00000; }
static void huge(struct attack *a) { a->desc[0].length = 0xffffffff; }
static void empty(struct attack *a) { a->desc[0].length = 0; }
static void bad_next(struct attack *a)
{
	a->desc[0].flags |= D_NEXT;
	a->desc[0].next = 0xffff;
}
static void bad_head(struct attack *a) { a->head = 0xffff; }
static void available_jump(struct attack *a) { a->entries = 0x7000; }
static void other_way(struct attack *a) { a->desc[0].flags ^= D_WRITE; }

static void indirect(struct attack *a, u64 table, u32 length)
{
	a->desc[4] = (struct desc){ table, length, D_INDIRECT, 0 };
	a->head = 4;
}
static void indirect_outside(struct attack *a) { indirect(a, NOWHERE, 32); }
static void indirect_odd(struct attack *a) { indirect(a, (u64)a->desc, 31); }
static void indirect_empty(struct attack *a) { indirect(a, (u64)a->desc, 0); }
static void indirect_huge(struct attack *a) { indirect(a, (u64)a->desc, 0xfffffff0); }
static void indirect_nested(struct attack *a)
{
	indirect(a, (u64)a->desc, 32);
	a->desc[0] = (struct desc){ (u64)a->desc, 32, D_INDIRECT, 0 };
}

// Sending: a header that lies in one field (virtio 1.2, 5.1.6), frames that are none.
static void header(struct attack *a, u32 offset, u8 value) { a->queue->pool[offset] = value; }
static void gso_type(struct attack *a) { header(a, 1, 0x55); }
static void gso_nothing(struct attack *a) { header(a, 1, 1); }
static void checksum_start(struct attack *a)
{
	header(a, 0, 1);
	header(a, 7, 0xff);
}
static void checksum_offset(struct attack *a)
{
	header(a, 0, 1);
	header(a, 9, 0xff);
}
static void header_length(struct attack *a) { header(a, 3, 0xff); }
static void only_header(struct attack *a) { a->desc[0].flags = 0; }
static void short_header(struct attack *a)
{
	a->desc[0].length = 5;
	a->desc[0].flags = 0;
}
static void runt(struct attack *a) { a->desc[1].length = 3; }
static void giant(struct attack *a)
{
	a->desc[1].address = (u64)tally.scratch;
	a->desc[1].length = GIANT;
}

// Receiving: room for no header.
static void small(struct attack *a) { a->desc[0].length = 11; }

// Commands.
static void no_answer(struct attack *a) { a->desc[1].flags = 0; }
static void readonly_answer(struct attack *a) { a->desc[2].flags = 0; }
static void empty_answer(struct attack *a) { a->desc[2].length = 0; }
static void only_answer(struct attack *a) { a->head = 2; }
static void cut(struct attack *a) { a->desc[0].length = 1; }
static void endless_table(struct attack *a)
{
	command[0] = 1; // VIRTIO_NET_CTRL_MAC, table
	for (u32 i = 0; i < 4; i++)
		room[i] = 0xff;
	a->desc[1].length = sizeof(room);
}

#define COMMON(queue) \
	{ queue "-none", none }, { queue "-loop", loop }, { queue "-self-loop", self_loop }, \
	{ queue "-outside", outside }, { queue "-outside-second", outside_second }, \
	{ queue "-wrapping", wrapping }, { queue "-mmio-hole", mmio_hole }, \
	{ queue "-huge", huge }, { queue "-empty", empty }, { queue "-bad-next", bad_next }, \
	{ queue "-bad-head", bad_head }, { queue "-available-jump", available_jump }, \
	{ queue "-other-way", other_way }, { queue "-indirect-outside", indirect_outside }, \
	{ queue "-indirect-odd", indirect_odd }, { queue "-indirect-empty", indirect_empty }, \
	{ queue "-indirect-huge", indirect_huge }, { queue "-indirect-nested", indirect_nested }

static const struct {
	const char *name;
	void (*spoil)(struct attack *a);
} attacks[] = {
	COMMON("tx"),
	COMMON("rx"),
	COMMON("ctrl"),
	{ "tx-gso-type", gso_type },
	{ "tx-gso-nothing", gso_nothing },
	{ "tx-checksum-start", checksum_start },
	{ "tx-checksum-offset", checksum_offset },
	{ "tx-header-length", header_length },
	{ "tx-only-header", only_header },
	{ "tx-short-header", short_header },
	{ "tx-runt", runt },
	{ "tx-giant", giant },
	{ "rx-small", small },
	{ "ctrl-no-answer", no_answer },
	{ "ctrl-readonly-answer", readonly_answer },
	{ "ctrl-empty-answer", empty_answer },
	{ "ctrl-only-answer", only_answer },
	{ "ctrl-cut", cut },
	{ "ctrl-endless-table", endless_table },
};

static void attack_run(struct attack *a, const char *name)
{
	volatile u64 *seen = &interrupt_count[VECTOR_GSI + a->nic->virtio.gsi], old = *seen;
	u64 deadline = clock_ns() + WAIT;
	volatile u16 *index = &a->queue->used.index;
	u16 before = *index, published = a->queue->published;

	a->queue->avail.ring[a->queue->published % a->queue->size] = a->head;
	a->queue->published += a->entries;
	net_kick(a->nic, a->number, published);
	while (*index == before && !(virtio_get(&a->nic->virtio, REG_STATUS) & STATUS_NEEDS_RESET) &&
	       wait_change(seen, old, deadline))
		;
	timer_stop();
	print("ok net.hostile %s used=%u ack=0x%x device=0x%x\n", name, (u64)(u16)(*index - before),
	      (u64)*(volatile u8 *)&ack, (u64)virtio_get(&a->nic->virtio, REG_STATUS));
}

bool net_hostile(struct nic *nic, const char *kind)
{
	bool receive = starts_with(kind, "rx"), control = starts_with(kind, "ctrl");
	struct attack a = { nic, NULL, NULL, 0, 0, 1 };

	ack = S_NONE;
	for (u32 i = 0; i < ARRAY_SIZE(attacks); i++) {
		if (compare(attacks[i].name, kind))
			continue;
		// From a reset, so that nothing else is on the ring.
		if (!nic_init(nic, ~0ull, 0, receive ? NO_BUFFERS : 0)) {
			print("fail net.hostile the device refuses the driver\n");
			return true;
		}
		a.number = receive ? 0 : control ? nic->queues - 1 : 1;
		a.queue = &nic->queue[a.number];
		a.desc = a.queue->desc;
		if (receive)
			receive_chain(&a);
		else if (control)
			control_chain(&a);
		else
			send_chain(&a);
		attacks[i].spoil(&a);
		attack_run(&a, kind);
		nic->virtio.ready = false; // the next command starts from a reset
		return true;
	}
	return false;
}

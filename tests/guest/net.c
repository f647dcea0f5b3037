#include "net.h"

struct nic nics[MAX_NICS];
u32 nic_count;
struct net_tally tally;
static BIG struct net_queue queues[MAX_NICS][NET_QUEUES];
static BIG u8 rx_pools[MAX_NICS][MAX_PAIRS][RX_POOL] __attribute__((aligned(4096)));
static BIG u8 tx_pools[MAX_NICS][MAX_PAIRS][TX_POOL] __attribute__((aligned(4096)));
static BIG u8 seen[MAX_FRAMES], scratch[GIANT] __attribute__((aligned(4096)));

static u32 get(struct nic *nic, u32 reg) { return virtio_get(&nic->virtio, reg); }

// NICs are where the command line says, in its order.
void net_probe(void)
{
	const char *text = command_line();

	tally.seen = seen;
	tally.scratch = scratch;
	while (nic_count < MAX_NICS && virtio_find(&nics[nic_count].virtio, &text, 1)) {
		nics[nic_count].queue = queues[nic_count];
		nic_count++;
	}
}

// `number`: the device's; the queue's memory is nic->queue[at].
static bool queue_init(struct nic *nic, u32 number, u32 at, u32 size)
{
	struct net_queue *queue = &nic->queue[at];

	queue->size = virtio_ring(&nic->virtio, number, size, queue->desc, &queue->avail,
				  &queue->used);
	memset(queue->busy, 0, sizeof(queue->busy));
	queue->last_used = queue->published = 0;
	return queue->size;
}

static void set_pool(struct net_queue *queue, u8 *pool, u32 bytes, u32 buffer)
{
	queue->pool = pool;
	queue->buffer = buffer;
	queue->slots = bytes / buffer < queue->size ? bytes / buffer : queue->size;
}

static void fill_receive_queue(struct nic *nic, u32 pair)
{
	struct net_queue *queue = &nic->queue[2 * pair];

	for (u32 slot = 0; slot < queue->slots; slot++) {
		queue->desc[slot] = (struct desc){ (u64)queue->pool + slot * queue->buffer,
						   queue->buffer, D_WRITE, 0 };
		queue->busy[slot] = true;
		queue->avail.ring[queue->published++ % queue->size] = (u16)slot;
	}
	net_kick(nic, 2 * pair, 0);
}

u64 nic_mac(struct nic *nic)
{
	return get(nic, REG_CONFIG) | (u64)(get(nic, REG_CONFIG + 4) & 0xffff) << 32;
}

struct net_queue *control_queue(struct nic *nic) { return &nic->queue[nic->queues - 1]; }

static bool set_queues(struct nic *nic, u32 size, u32 buffer)
{
	// virtio 1.2, 5.1.2: the control queue follows the pairs that the driver may use.
	u32 all = nic->virtio.features & N_MQ ? get(nic, REG_CONFIG + 8) & 0xffff : 1;

	nic->pairs = all < MAX_PAIRS ? all : MAX_PAIRS;
	nic->queues = 2 * nic->pairs;
	for (u32 i = 0; i < 2 * nic->pairs; i++) {
		u32 number = (u32)(nic - nics);

		if (!queue_init(nic, i, i, size))
			return false;
		if (i % 2)
			set_pool(&nic->queue[i], tx_pools[number][i / 2], TX_POOL, TX_BUFFER);
		else
			set_pool(&nic->queue[i], rx_pools[number][i / 2], RX_POOL, buffer);
	}
	if (!(nic->virtio.features & N_CTRL_VQ))
		return true;
	return queue_init(nic, 2 * all, nic->queues++, size);
}

bool nic_init(struct nic *nic, u64 mask, u32 size, u32 buffer)
{
	if (!virtio_begin(&nic->virtio, N_KNOWN & mask) ||
	    !set_queues(nic, size && size < MAX_SIZE ? size : MAX_SIZE, buffer ? buffer : 1600))
		return false;
	nic->mac = nic_mac(nic);
	virtio_go(&nic->virtio);
	for (u32 pair = 0; pair < nic->pairs; pair++)
		fill_receive_queue(nic, pair);
	return nic->virtio.ready;
}

// The queue's number for the device.
static u32 device_number(struct nic *nic, u32 number)
{
	bool control = nic->virtio.features & N_CTRL_VQ && number == nic->queues - 1;

	if (!control)
		return number;
	return nic->virtio.features & N_MQ ? 2 * (get(nic, REG_CONFIG + 8) & 0xffff) : 2;
}

void net_kick(struct nic *nic, u32 number, u16 before)
{
	struct net_queue *queue = &nic->queue[number];

	virtio_kick(&nic->virtio, device_number(nic, number), &queue->avail, &queue->used,
		    queue->size, queue->published, before);
}

static void want_interrupt(struct nic *nic, struct net_queue *queue)
{
	if (nic->virtio.features & F_EVENT_INDEX)
		*(volatile u16 *)&queue->avail.ring[queue->size] = queue->last_used;
	barrier();
}

int net_reclaim(struct nic *nic, u32 number)
{
	struct net_queue *queue = &nic->queue[number];
	int count = 0;

	while (*(volatile u16 *)&queue->used.index != queue->last_used) {
		u32 id = *(volatile u32 *)&queue->used.ring[queue->last_used % queue->size].id;

		if (id >= queue->size || !queue->busy[id]) {
			print("note used ring of queue %u names chain %u\n", (u64)number, (u64)id);
			return -1;
		}
		queue->busy[id] = false;
		queue->last_used++;
		count++;
	}
	want_interrupt(nic, queue);
	return count;
}

bool net_collect(struct nic *nic, u32 pair)
{
	struct net_queue *queue = &nic->queue[2 * pair];

	while (*(volatile u16 *)&queue->used.index != queue->last_used) {
		u16 before = queue->published;

		tally.mergeable = nic->virtio.features & N_MRG_RXBUF;
		run_user(user_net_collect, (u64)queue, (u64)&tally, 0, 0);
		net_kick(nic, 2 * pair, before);
		if (tally.broken) {
			print("note a receive queue's used ring is wrong: 0x%x\n", tally.broken);
			return false;
		}
		want_interrupt(nic, queue);
	}
	return true;
}

u64 net_queue_batch(struct nic *nic, u32 pair, struct net_batch *batch)
{
	struct net_queue *queue = &nic->queue[2 * pair + 1];
	u16 before = queue->published;
	u64 count = run_user(user_net_fill, (u64)queue, (u64)batch, 0, 0);

	if (count)
		net_kick(nic, 2 * pair + 1, before);
	return count;
}

u8 net_control(struct nic *nic, u8 class, u8 command, const u8 *data, u32 length)
{
	static u8 header[2], ack;
	struct net_queue *queue = control_queue(nic);
	u64 deadline = clock_ns() + TIMEOUT;
	volatile u64 *count = &interrupt_count[VECTOR_GSI + nic->virtio.gsi], old;
	u16 before = queue->published;

	header[0] = class;
	header[1] = command;
	ack = S_NONE;
	queue->desc[0] = (struct desc){ (u64)header, 2, D_NEXT, length ? 1 : 2 };
	queue->desc[1] = (struct desc){ (u64)data, length, D_NEXT, 2 };
	queue->desc[2] = (struct desc){ (u64)&ack, 1, D_WRITE, 0 };
	queue->busy[0] = true;
	queue->avail.ring[queue->published++ % queue->size] = 0;
	net_kick(nic, nic->queues - 1, before);
	for (;;) {
		int done;

		old = *count;
		done = net_reclaim(nic, nic->queues - 1);
		if (done)
			return done < 0 ? S_NONE : *(volatile u8 *)&ack;
		if (!wait_change(count, old, deadline))
			return S_NONE;
	}
}

#include "blk.h"

struct disk disks[MAX_DISKS];
u32 disk_count;
BIG u8 data[DATA_SIZE] __attribute__((aligned(4096)));
static BIG struct queue queues[MAX_DISKS][MAX_QUEUES];

// Disks are where the command line says, in its order.
void blk_probe(void)
{
	const char *text = command_line();

	while (disk_count < MAX_DISKS && virtio_find(&disks[disk_count].virtio, &text, 2)) {
		disks[disk_count].queue = queues[disk_count];
		disk_count++;
	}
}

static bool queue_init(struct disk *disk, u32 number, u32 size)
{
	struct queue *queue = &disk->queue[number];

	size = virtio_ring(&disk->virtio, number, size, queue->desc, &queue->avail, &queue->used);
	memset(queue->busy, 0, sizeof(queue->busy));
	queue->size = size;
	queue->slots = disk->virtio.features & F_INDIRECT ? size : size / 3;
	queue->last_used = queue->published = 0;
	return size;
}

bool disk_init(struct disk *disk, u64 mask, u32 size)
{
	struct virtio *device = &disk->virtio;

	if (!virtio_begin(device, F_KNOWN & mask))
		return false;
	disk->queues = device->features & F_MQ ? virtio_get(device, REG_CONFIG + 32) >> 16 : 1;
	if (disk->queues > MAX_QUEUES)
		disk->queues = MAX_QUEUES;
	for (u32 i = 0; i < disk->queues; i++)
		if (!queue_init(disk, i, size && size < MAX_SIZE ? size : MAX_SIZE))
			return false;
	virtio_go(device);
	disk->capacity = virtio_get(device, REG_CONFIG) |
			 (u64)virtio_get(device, REG_CONFIG + 4) << 32;
	return device->ready;
}

// Fill the descriptors of request `slot` and put it on the ring; queue_kick makes it known.
u32 queue_add(struct disk *disk, u32 number, u32 slot, struct header header, u8 *buffer, u32 length)
{
	struct queue *queue = &disk->queue[number];
	bool indirect = disk->virtio.features & F_INDIRECT;
	struct desc *desc = indirect ? queue->indirect[slot] : &queue->desc[3 * slot];
	u16 first = indirect ? 0 : (u16)(3 * slot), at = 0;
	bool reads = header.type == T_IN || header.type == T_GET_ID;

	queue->header[slot] = header;
	queue->status[slot] = S_NONE;
	queue->busy[slot] = true;
	queue->want[slot] = 1 + (reads ? length : 0);
	desc[at++] = (struct desc){ (u64)&queue->header[slot], 16, D_NEXT, (u16)(first + 1) };
	if (length) {
		desc[at] = (struct desc){ (u64)buffer, length, D_NEXT | (reads ? D_WRITE : 0),
					  (u16)(first + at + 1) };
		at++;
	}
	desc[at++] = (struct desc){ (u64)&queue->status[slot], 1, D_WRITE, 0 };
	if (indirect) {
		queue->desc[slot] = (struct desc){ (u64)desc, at * 16u, D_INDIRECT, 0 };
		first = (u16)slot;
	}
	queue->avail.ring[queue->published++ % queue->size] = first;
	return first;
}

void queue_kick(struct disk *disk, u32 number, u16 before)
{
	struct queue *queue = &disk->queue[number];

	virtio_kick(&disk->virtio, number, &queue->avail, &queue->used, queue->size,
		    queue->published, before);
}

int queue_collect(struct disk *disk, u32 number, u8 *worst)
{
	struct queue *queue = &disk->queue[number];
	int count = 0;

	while (*(volatile u16 *)&queue->used.index != queue->last_used) {
		u32 at = queue->last_used++ % queue->size;
		u32 id = *(volatile u32 *)&queue->used.ring[at].id;
		u32 slot = disk->virtio.features & F_INDIRECT ? id : id / 3;

		if (slot >= queue->slots || !queue->busy[slot]) {
			print("note used ring names request %u\n", (u64)id);
			return -1;
		}
		queue->busy[slot] = false;
		if (queue->status[slot])
			*worst = queue->status[slot];
		else if (queue->used.ring[at].length != queue->want[slot]) {
			print("note used length %u, not %u\n", (u64)queue->used.ring[at].length,
			      (u64)queue->want[slot]);
			return -1;
		}
		count++;
	}
	if (disk->virtio.features & F_EVENT_INDEX)
		*(volatile u16 *)&queue->avail.ring[queue->size] = queue->last_used;
	barrier();
	return count;
}

u8 disk_request(struct disk *disk, u32 type, u64 sector, u8 *buffer, u32 length)
{
	u64 deadline = clock_ns() + TIMEOUT;
	volatile u64 *seen = &interrupt_count[VECTOR_GSI + disk->virtio.gsi], old;
	u16 before = disk->queue->published;
	u8 status = 0;
	int count;

	queue_add(disk, 0, 0, (struct header){ type, 0, sector }, buffer, length);
	queue_kick(disk, 0, before);
	for (;;) {
		old = *seen;
		count = queue_collect(disk, 0, &status);
		if (count)
			return count < 0 ? S_NONE : status;
		if (!wait_change(seen, old, deadline))
			return S_NONE;
	}
}

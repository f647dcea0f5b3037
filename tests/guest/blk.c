#include "blk.h"

struct disk disks[MAX_DISKS];
u32 disk_count;
BIG u8 data[DATA_SIZE] __attribute__((aligned(4096)));
static BIG struct queue queues[MAX_DISKS][MAX_QUEUES];

static u32 get(struct disk *disk, u32 reg) { return read32(disk->base + reg); }
static void put(struct disk *disk, u32 reg, u32 value) { write32(disk->base + reg, value); }

static void disk_interrupt(u32 vector)
{
	for (u32 i = 0; i < disk_count; i++) {
		u32 bits;

		if (disks[i].gsi + VECTOR_GSI != vector)
			continue;
		bits = get(&disks[i], REG_INTERRUPT);
		put(&disks[i], REG_ACK, bits);
		disks[i].config_changes += bits >> 1 & 1;
	}
}

// Disks are where the command line says, in its order.
void blk_probe(void)
{
	const char *text = command_line();

	for (; text && *text; text++) {
		struct disk *disk = &disks[disk_count];

		if (!starts_with(text, "virtio_mmio.device="))
			continue;
		while (*text && *text != '@' && *text != ' ')
			text++;
		if (*text != '@' || disk_count == MAX_DISKS)
			continue;
		disk->base = parse_number(text + 1, &text);
		disk->gsi = *text == ':' ? (u32)parse_number(text + 1, &text) : 0;
		if (get(disk, REG_MAGIC) == 0x74726976 && get(disk, REG_DEVICE) == 2) {
			disk->queue = queues[disk_count];
			disk_count++;
		}
		if (!*text)
			break;
	}
}

void disk_reset(struct disk *disk)
{
	u64 deadline = clock_ns() + TIMEOUT;

	put(disk, REG_STATUS, 0);
	while (get(disk, REG_STATUS) && clock_ns() < deadline)
		;
	disk->ready = false;
}

static void put_address(struct disk *disk, u32 reg, void *address)
{
	put(disk, reg, (u32)(u64)address);
	put(disk, reg + 4, (u32)((u64)address >> 32));
}

static bool queue_init(struct disk *disk, u32 number, u32 size)
{
	struct queue *queue = &disk->queue[number];
	u32 most;

	put(disk, REG_QUEUE, number);
	most = get(disk, REG_QUEUE_MAX);
	if (!most || get(disk, REG_QUEUE_READY))
		return false;
	if (size > most)
		size = most;
	memset(&queue->avail, 0, (sizeof(queue->avail) + 7) & ~7ul);
	memset(&queue->used, 0, (sizeof(queue->used) + 7) & ~7ul);
	memset(queue->busy, 0, sizeof(queue->busy));
	queue->size = size;
	queue->slots = disk->features & F_INDIRECT ? size : size / 3;
	queue->last_used = queue->published = 0;
	put(disk, REG_QUEUE_SIZE, size);
	put_address(disk, REG_DESC, queue->desc);
	put_address(disk, REG_AVAIL, &queue->avail);
	put_address(disk, REG_USED, &queue->used);
	put(disk, REG_QUEUE_READY, 1);
	return get(disk, REG_QUEUE_READY) == 1;
}

bool disk_init(struct disk *disk, u64 mask, u32 size)
{
	u32 status = 3;

	disk_reset(disk);
	put(disk, REG_STATUS, 1);
	put(disk, REG_STATUS, status);
	put(disk, REG_FEATURES_SELECT, 0);
	disk->features = get(disk, REG_FEATURES);
	put(disk, REG_FEATURES_SELECT, 1);
	disk->features |= (u64)get(disk, REG_FEATURES) << 32;
	disk->features &= (F_KNOWN & mask) | F_VERSION_1;
	put(disk, REG_DRIVER_SELECT, 0);
	put(disk, REG_DRIVER, (u32)disk->features);
	put(disk, REG_DRIVER_SELECT, 1);
	put(disk, REG_DRIVER, (u32)(disk->features >> 32));
	status |= STATUS_FEATURES_OK;
	put(disk, REG_STATUS, status);
	if (!(get(disk, REG_STATUS) & STATUS_FEATURES_OK))
		return false;
	disk->queues = disk->features & F_MQ ? read32(disk->base + REG_CONFIG + 32) >> 16 : 1;
	if (disk->queues > MAX_QUEUES)
		disk->queues = MAX_QUEUES;
	for (u32 i = 0; i < disk->queues; i++)
		if (!queue_init(disk, i, size && size < MAX_SIZE ? size : MAX_SIZE))
			return false;
	gsi_enable(disk->gsi, disk_interrupt);
	status |= STATUS_DRIVER_OK;
	put(disk, REG_STATUS, status);
	disk->capacity = get(disk, REG_CONFIG) | (u64)get(disk, REG_CONFIG + 4) << 32;
	disk->ready = get(disk, REG_STATUS) == status;
	return disk->ready;
}

// Fill the descriptors of request `slot` and put it on the ring; queue_kick makes it known.
u32 queue_add(struct disk *disk, u32 number, u32 slot, struct header header, u8 *buffer, u32 length)
{
	struct queue *queue = &disk->queue[number];
	bool indirect = disk->features & F_INDIRECT;
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
	bool needed;

	barrier();
	*(volatile u16 *)&queue->avail.index = queue->published;
	barrier();
	needed = !(*(volatile u16 *)&queue->used.flags & 1);
	if (disk->features & F_EVENT_INDEX) {
		u16 event = *(volatile u16 *)&queue->used.ring[queue->size];

		needed = (u16)(queue->published - event - 1) < (u16)(queue->published - before);
	}
	if (needed)
		put(disk, REG_NOTIFY, number);
}

int queue_collect(struct disk *disk, u32 number, u8 *worst)
{
	struct queue *queue = &disk->queue[number];
	int count = 0;

	while (*(volatile u16 *)&queue->used.index != queue->last_used) {
		u32 at = queue->last_used++ % queue->size;
		u32 id = *(volatile u32 *)&queue->used.ring[at].id;
		u32 slot = disk->features & F_INDIRECT ? id : id / 3;

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
	if (disk->features & F_EVENT_INDEX)
		*(volatile u16 *)&queue->avail.ring[queue->size] = queue->last_used;
	barrier();
	return count;
}

u8 disk_request(struct disk *disk, u32 type, u64 sector, u8 *buffer, u32 length)
{
	u64 deadline = clock_ns() + TIMEOUT;
	volatile u64 *seen = &interrupt_count[VECTOR_GSI + disk->gsi], old;
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

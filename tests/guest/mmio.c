#include "mmio.h"

#define MAX_STARTED 32

static struct virtio *started[MAX_STARTED]; // whose interrupts are to be acknowledged
static u32 started_count;

static void interrupt(u32 vector)
{
	for (u32 i = 0; i < started_count; i++) {
		u32 bits;

		if (started[i]->gsi + VECTOR_GSI != vector)
			continue;
		bits = virtio_get(started[i], REG_INTERRUPT);
		virtio_put(started[i], REG_ACK, bits);
		started[i]->config_changes += bits >> 1 & 1;
		if (started[i]->interrupted)
			started[i]->interrupted();
	}
}

bool virtio_find(struct virtio *device, const char **text, u32 id)
{
	const char *at = *text;

	for (; at && *at; at++) {
		if (!starts_with(at, "virtio_mmio.device="))
			continue;
		while (*at && *at != '@' && *at != ' ')
			at++;
		if (*at == '@') {
			device->base = parse_number(at + 1, &at);
			device->gsi = *at == ':' ? (u32)parse_number(at + 1, &at) : 0;
			if (virtio_get(device, REG_MAGIC) == 0x74726976 &&
			    virtio_get(device, REG_DEVICE) == id) {
				*text = at;
				return true;
			}
		}
		if (!*at)
			break;
	}
	*text = at;
	device->base = 0;
	return false;
}

void virtio_reset(struct virtio *device)
{
	u64 deadline = clock_ns() + TIMEOUT;

	device->ready = false;
	virtio_put(device, REG_STATUS, 0);
	while (virtio_get(device, REG_STATUS) && clock_ns() < deadline)
		;
}

bool virtio_begin(struct virtio *device, u64 known)
{
	virtio_reset(device);
	virtio_put(device, REG_STATUS, 1);
	virtio_put(device, REG_STATUS, 3);
	virtio_put(device, REG_FEATURES_SELECT, 0);
	device->features = virtio_get(device, REG_FEATURES);
	virtio_put(device, REG_FEATURES_SELECT, 1);
	device->features |= (u64)virtio_get(device, REG_FEATURES) << 32;
	device->features &= known | F_VERSION_1;
	virtio_put(device, REG_DRIVER_SELECT, 0);
	virtio_put(device, REG_DRIVER, (u32)device->features);
	virtio_put(device, REG_DRIVER_SELECT, 1);
	virtio_put(device, REG_DRIVER, (u32)(device->features >> 32));
	virtio_put(device, REG_STATUS, 3 | STATUS_FEATURES_OK);
	return virtio_get(device, REG_STATUS) & STATUS_FEATURES_OK;
}

static void put_address(struct virtio *device, u32 reg, void *address)
{
	virtio_put(device, reg, (u32)(u64)address);
	virtio_put(device, reg + 4, (u32)((u64)address >> 32));
}

u32 virtio_ring(struct virtio *device, u32 number, u32 size, struct desc *desc,
		struct avail *avail, struct used *used)
{
	u32 most;

	virtio_put(device, REG_QUEUE, number);
	most = virtio_get(device, REG_QUEUE_MAX);
	if (!most || virtio_get(device, REG_QUEUE_READY))
		return 0;
	if (size > most)
		size = most;
	memset(avail, 0, (sizeof(*avail) + 7) & ~7ul);
	memset(used, 0, (sizeof(*used) + 7) & ~7ul);
	virtio_put(device, REG_QUEUE_SIZE, size);
	put_address(device, REG_DESC, desc);
	put_address(device, REG_AVAIL, avail);
	put_address(device, REG_USED, used);
	virtio_put(device, REG_QUEUE_READY, 1);
	return virtio_get(device, REG_QUEUE_READY) == 1 ? size : 0;
}

bool virtio_go(struct virtio *device)
{
	u32 status = 3 | STATUS_FEATURES_OK | STATUS_DRIVER_OK, at = 0;

	while (at < started_count && started[at] != device)
		at++;
	if (at == MAX_STARTED)
		return false;
	started[at] = device;
	if (at == started_count)
		started_count++;
	gsi_enable(device->gsi, interrupt);
	virtio_put(device, REG_STATUS, status);
	device->ready = virtio_get(device, REG_STATUS) == status;
	return device->ready;
}

void virtio_kick(struct virtio *device, u32 number, struct avail *avail, struct used *used,
		 u32 size, u16 published, u16 before)
{
	bool needed;

	barrier();
	*(volatile u16 *)&avail->index = published;
	barrier();
	needed = !(*(volatile u16 *)&used->flags & 1);
	if (device->features & F_EVENT_INDEX) {
		u16 event = *(volatile u16 *)&used->ring[size];

		needed = (u16)(published - event - 1) < (u16)(published - before);
	}
	if (needed)
		virtio_put(device, REG_NOTIFY, number);
}

#include "small.h"

static u64 gsi_bases[32]; // whose interrupts are to be acknowledged

static u32 get(struct small_device *device, u32 reg) { return read32(device->base + reg); }
static void put(struct small_device *device, u32 reg, u32 value)
{
	write32(device->base + reg, value);
}

static void interrupt(u32 vector)
{
	u64 base = gsi_bases[(vector - VECTOR_GSI) % ARRAY_SIZE(gsi_bases)];

	if (base)
		write32(base + REG_ACK, read32(base + REG_INTERRUPT));
}

bool small_find(struct small_device *device, u32 id)
{
	const char *text = command_line();

	for (; text && *text && !device->base; text++) {
		u64 at;

		if (!starts_with(text, "virtio_mmio.device="))
			continue;
		while (*text && *text != '@' && *text != ' ')
			text++;
		if (*text != '@')
			continue;
		at = parse_number(text + 1, &text);
		if (read32(at + REG_MAGIC) != 0x74726976 || read32(at + REG_DEVICE) != id)
			continue;
		device->base = at;
		device->gsi = *text == ':' ? (u32)parse_number(text + 1, &text) : 0;
	}
	return device->base;
}

bool small_begin(struct small_device *device, u64 known)
{
	u64 deadline = clock_ns() + TIMEOUT;

	device->ready = false;
	put(device, REG_STATUS, 0);
	while (get(device, REG_STATUS) && clock_ns() < deadline)
		;
	put(device, REG_STATUS, 1);
	put(device, REG_STATUS, 3);
	put(device, REG_FEATURES_SELECT, 0);
	device->features = get(device, REG_FEATURES);
	put(device, REG_FEATURES_SELECT, 1);
	device->features |= (u64)get(device, REG_FEATURES) << 32;
	device->features &= known | F_VERSION_1;
	put(device, REG_DRIVER_SELECT, 0);
	put(device, REG_DRIVER, (u32)device->features);
	put(device, REG_DRIVER_SELECT, 1);
	put(device, REG_DRIVER, (u32)(device->features >> 32));
	put(device, REG_STATUS, 3 | STATUS_FEATURES_OK);
	return get(device, REG_STATUS) & STATUS_FEATURES_OK;
}

bool small_ring_init(struct small_device *device, struct small_ring *ring, u32 number)
{
	u64 parts[] = { (u64)ring->desc, (u64)&ring->avail, (u64)&ring->used };
	u32 registers[] = { REG_DESC, REG_AVAIL, REG_USED };

	memset(ring, 0, sizeof(*ring));
	ring->number = number;
	put(device, REG_QUEUE, number);
	if (get(device, REG_QUEUE_MAX) < SMALL_SIZE)
		return false;
	put(device, REG_QUEUE_SIZE, SMALL_SIZE);
	for (int i = 0; i < 3; i++) {
		put(device, registers[i], (u32)parts[i]);
		put(device, registers[i] + 4, (u32)(parts[i] >> 32));
	}
	put(device, REG_QUEUE_READY, 1);
	return get(device, REG_QUEUE_READY);
}

bool small_go(struct small_device *device)
{
	u32 status = 3 | STATUS_FEATURES_OK | STATUS_DRIVER_OK;

	gsi_bases[device->gsi % ARRAY_SIZE(gsi_bases)] = device->base;
	gsi_enable(device->gsi, interrupt);
	put(device, REG_STATUS, status);
	device->ready = get(device, REG_STATUS) == status;
	return device->ready;
}

void small_offer(struct small_device *device, struct small_ring *ring, u32 slot, void *buffer,
		 u32 length, bool writable)
{
	ring->desc[slot] = (struct desc){ (u64)buffer, length, writable ? D_WRITE : 0, 0 };
	ring->avail.ring[ring->published++ % SMALL_SIZE] = (u16)slot;
	ring->avail.ring[SMALL_SIZE] = ring->last_used; // used_event: tell of the next one
	barrier();
	*(volatile u16 *)&ring->avail.index = ring->published;
	barrier();
	put(device, REG_NOTIFY, ring->number);
}

int small_used(struct small_ring *ring, u32 *length)
{
	u32 at = ring->last_used % SMALL_SIZE;

	if (*(volatile u16 *)&ring->used.index == ring->last_used)
		return -1;
	ring->last_used++;
	ring->avail.ring[SMALL_SIZE] = ring->last_used;
	barrier();
	*length = *(volatile u32 *)&ring->used.ring[at].length;
	return (int)(*(volatile u32 *)&ring->used.ring[at].id % SMALL_SIZE);
}

int small_wait(struct small_device *device, struct small_ring *ring, u32 *length)
{
	u64 deadline = clock_ns() + TIMEOUT;
	volatile u64 *seen = &interrupt_count[VECTOR_GSI + device->gsi];

	for (;;) {
		u64 old = *seen;
		int slot = small_used(ring, length);

		if (slot >= 0 || !wait_change(seen, old, deadline))
			return slot;
	}
}

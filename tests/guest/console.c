// virtio-console (virtio 1.2, 5.3), with several ports.
#include "small.h"

#define PORTS 8
#define BUFFERS 8
#define BUFFER 4096
#define F_SIZE 1
#define F_MULTIPORT 2

enum { DEVICE_READY, ADD, REMOVE, READY, CONSOLE, RESIZE, OPEN, NAME };

struct message {
	u32 id;
	u16 event, value;
	char text[56];
};

static struct virtio device;
static BIG struct small_ring rings[2 * PORTS + 2];
static BIG u8 room[2 * PORTS + 2][BUFFERS][BUFFER];
static struct message message;
static u32 ports;

static u32 rx(u64 port) { return port ? 2 * (u32)port + 2 : 0; }

static void offer_room(u32 queue)
{
	for (u32 slot = 0; slot < BUFFERS; slot++)
		small_offer(&device, &rings[queue], slot, room[queue][slot], BUFFER, true);
}

static bool init(u64 mask)
{
	if (!small_begin(&device, 3, mask))
		return false;
	ports = virtio_get(&device, REG_CONFIG + 4);
	if (!ports || ports > PORTS)
		return false;
	for (u32 queue = 0; queue < (device.features & F_MULTIPORT ? 2 * ports + 2 : 2); queue++)
		if (!small_ring_init(&device, &rings[queue], queue))
			return false;
	if (!virtio_go(&device))
		return false;
	for (u32 queue = 0; queue < (device.features & F_MULTIPORT ? 2 * ports + 2 : 2); queue += 2)
		offer_room(queue);
	return true;
}

static bool send(u32 queue, void *data, u32 length)
{
	u32 written;

	small_offer(&device, &rings[queue], 0, data, length, false);
	return small_wait(&device, &rings[queue], &written) >= 0;
}

static bool tell(u64 port, u64 event, u64 value)
{
	message = (struct message){ (u32)port, (u16)event, (u16)value, "" };
	return send(3, &message, 8);
}

// Notes of the control messages that came, `count` of them.
static void messages_command(u64 count)
{
	for (u64 i = 0; i < count; i++) {
		u32 length;
		int slot = small_wait(&device, &rings[2], &length);
		struct message *came = (void *)room[2][slot < 0 ? 0 : slot];

		if (slot < 0 || length < 8 || length >= BUFFER) {
			print("fail con.messages got=%u\n", i);
			return;
		}
		room[2][slot][length] = 0;
		print("note port=%u event=%u value=%u text=%s\n", (u64)came->id, (u64)came->event,
		      (u64)came->value, came->event == NAME ? came->text : "");
		small_offer(&device, &rings[2], (u32)slot, room[2][slot], BUFFER, true);
	}
	print("ok con.messages\n");
}

// con.read PORT COUNT: so many bytes; the CRC of them, and the text if it is short.
static void read_command(u64 port, u64 count)
{
	static BIG u8 data[1 << 17];
	u32 queue = rx(port), got = 0;
	u64 crc;

	while (got < count && got + BUFFER <= sizeof(data)) {
		u32 length;
		int slot = small_wait(&device, &rings[queue], &length);

		if (slot < 0 || length > BUFFER) {
			print("fail con.read got=%u\n", (u64)got);
			return;
		}
		memcpy(data + got, room[queue][slot], length);
		got += length;
		small_offer(&device, &rings[queue], (u32)slot, room[queue][slot], BUFFER, true);
	}
	crc = run_user(user_crc32, (u64)data, got, 0, 0);
	data[got < 64 ? got : 0] = 0;
	print("ok con.read got=%u crc=0x%x text=%s\n", (u64)got, crc, (char *)data);
}

// con.flood PORT COUNT LENGTH: so many lines of this length, numbered.
static void flood_command(u64 port, u64 count, u64 length)
{
	static char text[BUFFER];

	if (length < 16 || length > sizeof(text))
		length = 64;
	memset(text, '.', length - 1);
	text[length - 1] = '\n';
	for (u64 i = 0; i < count; i++) {
		for (u64 rest = i, at = 8; at; rest /= 10)
			text[--at] = (char)('0' + rest % 10);
		if (!send(rx(port) + 1, text, (u32)length)) {
			print("fail con.flood sent=%u\n", i);
			return;
		}
	}
	print("ok con.flood\n");
}

static u32 length_of(const char *text)
{
	u32 length = 0;

	while (text[length])
		length++;
	return length;
}

bool console_command(int argc, char **words, u64 *argv)
{
	const char *name = words[0];

	if (!compare(name, "con.init")) {
		bool good = init(argc > 1 ? argv[1] : F_SIZE | F_MULTIPORT | F_EVENT_INDEX);

		print("%s con.init features=0x%x ports=%u\n", good ? "ok" : "fail", device.features,
		      (u64)ports);
	} else if (!starts_with(name, "con.") || !device.ready) {
		return false;
	} else if (!compare(name, "con.tell") && argc > 3) {
		print("%s con.tell\n", tell(argv[1], argv[2], argv[3]) ? "ok" : "fail");
	} else if (!compare(name, "con.messages") && argc > 1) {
		messages_command(argv[1]);
	} else if (!compare(name, "con.write") && argc > 2) {
		print("%s con.write\n", send(rx(argv[1]) + 1, words[2], length_of(words[2])) ? "ok" :
											  "fail");
	} else if (!compare(name, "con.read") && argc > 2) {
		read_command(argv[1], argv[2]);
	} else if (!compare(name, "con.flood") && argc > 2) {
		flood_command(argv[1], argv[2], argc > 3 ? argv[3] : 64);
	} else {
		return false;
	}
	return true;
}

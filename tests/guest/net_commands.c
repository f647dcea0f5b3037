// The commands net.…: NIC is a number, 0 is the first.
#include "net.h"

#define PEER 0xffeedd005452ull  // 52:54:00:dd:ee:ff
#define QUIET (250 * NSEC_PER_MS) // without progress for so long: what is under way is lost
#define MAX_SIZE_SENT (TX_BUFFER - NET_HEADER)

static u64 argument(int argc, u64 *argv, int index, u64 absent)
{
	return index < argc ? argv[index] : absent;
}

// A config field or a MAC address, its bytes in the order in which people write them.
static u64 in_order(u64 mac)
{
	u64 value = 0;

	for (u32 i = 0; i < 6; i++)
		value = value << 8 | (mac >> 8 * i & 0xff);
	return value;
}

static void begin_tally(u64 first, u64 count)
{
	u8 *seen = tally.seen, *scratch = tally.scratch;

	memset(&tally, 0, sizeof(tally));
	tally.seen = seen;
	tally.scratch = scratch;
	tally.first = first;
	tally.count = count;
	run_user(user_zero, (u64)seen, MAX_FRAMES / 8, 0, 0);
}

static void info(struct nic *nic)
{
	u64 config = nic->virtio.base + REG_CONFIG;

	print("ok net.info mac=0x%x status=%u max-pairs=%u mtu=%u features=0x%x pairs=%u size=%u "
	      "changes=%u device=0x%x\n",
	      in_order(nic_mac(nic)), (u64)read8(config + 6) | (u64)read8(config + 7) << 8,
	      (u64)read32(config + 8) & 0xffff, (u64)read32(config + 8) >> 16, nic->virtio.features,
	      (u64)nic->pairs, (u64)nic->queue->size, nic->virtio.config_changes,
	      (u64)virtio_get(&nic->virtio, REG_STATUS));
}

// net.await NIC CHANGES MILLISECONDS: until its configuration has changed more often than that.
static void await_command(struct nic *nic, u64 changes, u64 limit)
{
	u64 deadline = clock_ns() + limit * NSEC_PER_MS;

	print("note waiting\n");
	while (nic->virtio.config_changes == changes &&
	       wait_change(&nic->virtio.config_changes, changes, deadline))
		;
	timer_stop();
	print("%s net.await changes=%u\n", nic->virtio.config_changes == changes ? "fail" : "ok",
	      nic->virtio.config_changes);
}

// Wait until the device has given back all that a queue sent; false: it doesn't.
static bool drain(struct nic *nic, u32 number)
{
	struct net_queue *queue = &nic->queue[number];
	volatile u64 *seen = &interrupt_count[VECTOR_GSI + nic->virtio.gsi], old;
	u64 deadline = clock_ns() + TIMEOUT;

	for (;;) {
		int count;

		old = *seen;
		count = net_reclaim(nic, number);
		if (count < 0)
			return false;
		if (queue->last_used == queue->published)
			return true;
		if (count)
			deadline = clock_ns() + TIMEOUT;
		else if (!wait_change(seen, old, deadline)) {
			print("note queue %u: %u of %u given back, device 0x%x\n", (u64)number,
			      (u64)queue->last_used, (u64)queue->published,
			      (u64)virtio_get(&nic->virtio, REG_STATUS));
			return false;
		}
	}
}

// net.send NIC COUNT SIZE [FIRST PAIR]: frames with these numbers; size 0: mixed.
static void send_command(struct nic *nic, u64 count, u64 size, u64 first, u64 pair)
{
	struct net_batch batch = { PEER, nic->mac, first, count, size };

	while (batch.count) {
		u64 queued = net_queue_batch(nic, (u32)pair, &batch);

		batch.first += queued;
		batch.count -= queued;
		if (!drain(nic, 2 * (u32)pair + 1)) {
			print("fail net.send left=%u\n", batch.count);
			return;
		}
	}
	print("ok net.send frames=%u\n", count);
}

// net.flood NIC MILLISECONDS SIZE [PAIR]: as many as go.
static void flood_command(struct nic *nic, u64 limit, u64 size, u64 pair)
{
	struct net_batch batch = { PEER, nic->mac, 0, MAX_SIZE, size };
	u64 deadline = clock_ns() + limit * NSEC_PER_MS, frames = 0;

	while (clock_ns() < deadline) {
		u64 queued = net_queue_batch(nic, (u32)pair, &batch);

		batch.first += queued;
		frames += queued;
		if (net_reclaim(nic, 2 * (u32)pair + 1) < 0) {
			print("fail net.flood\n");
			return;
		}
	}
	print("%s net.flood frames=%u\n", drain(nic, 2 * (u32)pair + 1) ? "ok" : "fail", frames);
}

// Waits for something on a NIC; every pair is looked at. False: the device wrote nonsense.
static bool collect_all(struct nic *nic)
{
	for (u32 pair = 0; pair < nic->pairs; pair++)
		if (!net_collect(nic, pair))
			return false;
	return true;
}

static void print_tally(bool right, const char *name, u64 sent)
{
	print("%s net.%s sent=%u frames=%u bytes=%u lost=%u twice=%u late=%u bad=%u other=%u "
	      "buffers=%u largest=%u header=0x%x\n",
	      right ? "ok" : "fail", name, sent, tally.frames, tally.bytes,
	      tally.count - tally.frames, tally.twice, tally.late, tally.bad, tally.other,
	      tally.buffers, tally.largest, tally.header);
}

// net.recv NIC COUNT [FIRST MILLISECONDS]: frames with these numbers. Ok: all came, none wrong.
static void recv_command(struct nic *nic, u64 count, u64 first, u64 limit)
{
	volatile u64 *seen = &interrupt_count[VECTOR_GSI + nic->virtio.gsi], old;
	u64 deadline = clock_ns() + limit * NSEC_PER_MS;
	bool right = true;

	begin_tally(first, count);
	print("note receiving\n");
	while (right && tally.frames < count) {
		u64 before = tally.buffers;

		old = *seen;
		right = collect_all(nic);
		if (tally.buffers != before)
			deadline = clock_ns() + limit * NSEC_PER_MS;
		else if (right && !wait_change(seen, old, deadline))
			break;
	}
	timer_stop();
	print_tally(right && tally.frames == count && !tally.bad && !tally.twice, "recv", 0);
}

struct echo {
	struct net_batch batch;
	u64 window, under_way, lost, longest, progress;
	u32 pair;
};

// One look at everything. False: something is wrong for good.
static bool echo_step(struct nic *nic, struct echo *echo)
{
	u64 before = tally.frames, count = echo->batch.count;

	if (net_reclaim(nic, 2 * echo->pair + 1) < 0 || !collect_all(nic))
		return false;
	before = tally.frames - before;
	if (before) {
		u64 waited = clock_ns() - echo->progress;

		if (waited > echo->longest)
			echo->longest = waited;
		echo->progress = clock_ns();
	}
	echo->under_way = echo->under_way > before ? echo->under_way - before : 0;
	if (count && echo->under_way < echo->window) {
		u64 queued;

		echo->batch.count = echo->window - echo->under_way;
		if (echo->batch.count > count)
			echo->batch.count = count;
		queued = net_queue_batch(nic, echo->pair, &echo->batch);
		echo->batch.count = count - queued;
		echo->batch.first += queued;
		echo->under_way += queued;
	}
	return !tally.bad;
}

// net.echo NIC COUNT SIZE [WINDOW PAIR]: frames that a peer sends back; the next one goes when
// another one has come, or when nothing came for a while: then it is lost.
static void echo_command(struct nic *nic, u64 count, u64 size, u64 window, u64 pair)
{
	volatile u64 *seen = &interrupt_count[VECTOR_GSI + nic->virtio.gsi], old;
	struct echo echo = { { PEER, nic->mac, 0, count, size }, window, 0, 0, 0, clock_ns(),
			     (u32)pair };
	u64 last = clock_ns();
	bool right = true;

	begin_tally(0, 0);
	right = collect_all(nic); // what came before
	begin_tally(0, count);
	while (right && (echo.batch.count || echo.under_way)) {
		u64 frames = tally.frames, left = echo.batch.count;

		old = *seen;
		right = echo_step(nic, &echo);
		if (tally.frames != frames)
			last = clock_ns();
		if (tally.frames != frames || echo.batch.count != left)
			continue;
		if (right && clock_ns() - last > TIMEOUT) {
			print("note nothing comes back, device 0x%x\n",
			      (u64)virtio_get(&nic->virtio, REG_STATUS));
			right = false;
		} else if (right && !wait_change(seen, old, echo.progress + QUIET)) {
			echo.under_way = 0;
			echo.progress = clock_ns();
		}
	}
	timer_stop();
	right = right && drain(nic, 2 * echo.pair + 1);
	print("note longest-us=%u\n", echo.longest / 1000);
	print_tally(right && !tally.bad, "echo", count - echo.batch.count);
}

static u32 checksum_add(u32 sum, const u8 *data, u32 length)
{
	for (u32 i = 0; i < length; i += 2)
		sum += (u32)data[i] << 8 | data[i + 1];
	return sum;
}

// net.gso NIC BYTES SEGMENT: a TCP segment of 10.0.0.2 to 10.0.0.1 that is to be cut.
static void gso_command(struct nic *nic, u64 bytes, u64 segment)
{
	static const u8 headers[NET_HEADER + 54] = {
		1, 1, 54, 0, 0, 0, 34, 0, 16, 0, 0, 0, // NEEDS_CSUM, GSO_TCPV4
		0x52, 0x54, 0, 0xdd, 0xee, 0xff, 0x52, 0x54, 0, 0xaa, 0xbb, 0xcc, 8, 0,
		0x45, 0, 0, 0, 0, 1, 0, 0, 64, 6, 0, 0, 10, 0, 0, 2, 10, 0, 0, 1,
		3, 232, 7, 208, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 3, 232, 0, 0, 0, 0,
	};
	struct net_queue *queue = &nic->queue[1];
	u8 *frame = queue->pool, *ip = frame + NET_HEADER + 14;
	u16 before = queue->published, length = (u16)(40 + bytes);
	u32 sum;

	if (!drain(nic, 1)) {
		print("fail net.gso\n");
		return;
	}
	memcpy(frame, headers, sizeof(headers));
	frame[4] = (u8)segment;
	frame[5] = (u8)(segment >> 8);
	ip[2] = (u8)(length >> 8);
	ip[3] = (u8)length;
	sum = checksum_add(0, ip, 20);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = ~((sum & 0xffff) + (sum >> 16));
	ip[10] = (u8)(sum >> 8);
	ip[11] = (u8)sum;
	// The pseudo header, as NEEDS_CSUM wants it.
	sum = checksum_add(6 + (u32)(20 + bytes), ip + 12, 8);
	sum = (sum & 0xffff) + (sum >> 16);
	ip[36] = (u8)(sum >> 8);
	ip[37] = (u8)sum;
	run_user(user_fill, (u64)(frame + 128), (bytes + 7) / 8, 0, bytes);
	queue->desc[0] = (struct desc){ (u64)frame, sizeof(headers), D_NEXT, 1 };
	queue->desc[1] = (struct desc){ (u64)frame + 128, (u32)bytes, 0, 0 };
	queue->busy[0] = true;
	queue->avail.ring[queue->published++ % queue->size] = 0;
	net_kick(nic, 1, before);
	print("%s net.gso bytes=%u\n", drain(nic, 1) ? "ok" : "fail", bytes);
}

static u32 parse_bytes(const char *text, u8 *to, u32 room)
{
	u32 count = 0;

	for (; text[0] && text[1] && count < room; text += 2, count++) {
		char digits[3] = { text[0], text[1], 0 }, whole[5] = { '0', 'x', 0, 0, 0 };

		memcpy(whole + 2, digits, 3);
		to[count] = (u8)parse_number(whole, NULL);
	}
	return count;
}

// net.ctrl NIC CLASS COMMAND [BYTES]: hexadecimal digits.
static void ctrl_command(struct nic *nic, u64 class, u64 command, const char *bytes)
{
	static u8 content[2048];
	u32 length = bytes ? parse_bytes(bytes, content, sizeof(content)) : 0;
	u8 ack;

	if (!(nic->virtio.features & N_CTRL_VQ)) {
		print("fail net.ctrl the device has no control queue\n");
		return;
	}
	ack = net_control(nic, (u8)class, (u8)command, content, length);
	print("%s net.ctrl ack=%u\n", ack == NET_OK ? "ok" : "fail", (u64)ack);
}

static bool frames_command(struct nic *nic, const char *name, int argc, u64 *argv)
{
	u64 count = argument(argc, argv, 2, 1), size = argument(argc, argv, 3, 0);
	u64 pair = argument(argc, argv, 5, 0), fourth = argument(argc, argv, 4, 0);
	bool sends = !compare(name, "send") || !compare(name, "echo");

	if (!compare(name, "flood")) // net.flood NIC MILLISECONDS SIZE [PAIR]
		pair = argument(argc, argv, 4, 0);
	if ((sends && (size > MAX_SIZE_SENT || (size && size < 60) || count > MAX_FRAMES)) ||
	    pair >= nic->pairs)
		print("fail net.%s 60 to %u bytes, %u frames, pair 0 to %u\n", name,
		      (u64)MAX_SIZE_SENT, (u64)MAX_FRAMES, (u64)nic->pairs - 1);
	else if (!compare(name, "send"))
		send_command(nic, count, size, fourth, pair);
	else if (!compare(name, "echo"))
		echo_command(nic, count, size, fourth ? fourth : 32, pair);
	else if (!compare(name, "flood"))
		flood_command(nic, count, size ? size : 60, pair);
	else if (!compare(name, "recv"))
		recv_command(nic, count, size, fourth ? fourth : 3000);
	else if (!compare(name, "gso"))
		gso_command(nic, count, size ? size : 1448);
	else
		return false;
	return true;
}

bool net_command(int argc, char **words, u64 *argv)
{
	const char *name = words[0] + 4;
	struct nic *nic = &nics[argument(argc, argv, 1, 0) % MAX_NICS];

	if (!starts_with(words[0], "net."))
		return false;
	if (!compare(name, "count")) {
		print("ok net.count %u\n", (u64)nic_count);
		return true;
	}
	if (nic >= &nics[nic_count]) {
		print("fail %s no such NIC\n", words[0]);
		return true;
	}
	if (!compare(name, "init")) { // net.init NIC [FEATURES QUEUE-SIZE BUFFER]
		bool right = nic_init(nic, argument(argc, argv, 2, ~0ull),
				      (u32)argument(argc, argv, 3, 0),
				      (u32)argument(argc, argv, 4, 0));

		print("%s net.init features=0x%x status=0x%x\n", right ? "ok" : "fail",
		      nic->virtio.features, (u64)virtio_get(&nic->virtio, REG_STATUS));
		return true;
	}
	if (!compare(name, "reset")) {
		virtio_reset(&nic->virtio);
		print("ok net.reset\n");
		return true;
	}
	if (!nic->virtio.ready && !nic_init(nic, ~0ull, 0, 0)) {
		print("fail %s the device refuses the driver\n", words[0]);
		return true;
	}
	if (!compare(name, "info"))
		info(nic);
	else if (!compare(name, "await"))
		await_command(nic, argument(argc, argv, 2, 0), argument(argc, argv, 3, 5000));
	else if (!compare(name, "ctrl") && argc > 3)
		ctrl_command(nic, argv[2], argv[3], argc > 4 ? words[4] : NULL);
	else if (!compare(name, "hostile") && argc > 2)
		return net_hostile(nic, words[2]);
	else
		return frames_command(nic, name, argc, argv);
	return true;
}

// loadgen prepare FILE BYTES SEED
// loadgen run --socket PATH [options]      one line of JSON on standard output
#include "loadgen.h"

#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define RING_ADDRESS 0x1000u

static const char usage[] =
	"usage: loadgen prepare FILE BYTES SEED\n"
	"       loadgen run --socket PATH [options]\n"
	"\n"
	"  --pid PID           the back end, whose CPU time counts with that of its descendants\n"
	"  --pattern NAME      randread, randwrite, randrw, seqread, seqwrite\n"
	"  --depth N           requests on the way at once (1)\n"
	"  --block BYTES       size of a request (4096)\n"
	"  --segment BYTES     size of a descriptor (the whole request)\n"
	"  --span BYTES        use the first so many bytes of the disk (all)\n"
	"  --queue-size N      ring entries (128)\n"
	"  --seconds S         measured time (1)\n"
	"  --requests N        stop after so many instead\n"
	"  --seed N            of places and data (1)\n"
	"  --readback N        blocks that are read again after writes (4096)\n"
	"  --pin CPU           run on that CPU\n"
	"  --sectors-only      verify each sector's first 16 bytes, not all\n"
	"  --no-event-index    without the event index\n"
	"  --no-indirect       without indirect descriptors\n";

const char program[] = "loadgen";

static enum pattern parse_pattern(const char *text)
{
	static const char *const names[] = {"randread", "randwrite", "seqread", "seqwrite", "randrw"};

	for (unsigned int i = 0; i < 5; i++)
		if (!strcmp(names[i], text))
			return (enum pattern)i;
	fail("--pattern %s: unknown", text);
}

static void set_option(struct options *options, int option, const char *name, const char *value)
{
	switch (option) {
	case 's': options->socket = value; break;
	case 'p': options->pid = (pid_t)number(name, value); break;
	case 'P': options->pattern = parse_pattern(value); break;
	case 'd': options->depth = (unsigned int)number(name, value); break;
	case 'b': options->block = number(name, value); break;
	case 'g': options->segment = number(name, value); break;
	case 'n': options->span = number(name, value); break;
	case 'q': options->queue_size = (unsigned int)number(name, value); break;
	case 't': options->seconds = strtod(value, NULL); break;
	case 'r': options->requests = number(name, value); break;
	case 'S': options->seed = number(name, value); break;
	case 'R': options->readback = number(name, value); break;
	case 'c': options->pin = (int)number(name, value); break;
	case 'o': options->sectors_only = true; break;
	case 'E': options->event_index = false; break;
	case 'I': options->indirect = false; break;
	default: fail("see loadgen --help");
	}
}

static void parse(struct options *options, int argc, char **argv)
{
	static const struct option names[] = {
		{"socket", 1, NULL, 's'}, {"pid", 1, NULL, 'p'}, {"pattern", 1, NULL, 'P'},
		{"depth", 1, NULL, 'd'}, {"block", 1, NULL, 'b'}, {"segment", 1, NULL, 'g'},
		{"span", 1, NULL, 'n'}, {"queue-size", 1, NULL, 'q'}, {"seconds", 1, NULL, 't'},
		{"requests", 1, NULL, 'r'}, {"seed", 1, NULL, 'S'}, {"readback", 1, NULL, 'R'},
		{"pin", 1, NULL, 'c'}, {"sectors-only", 0, NULL, 'o'},
		{"no-event-index", 0, NULL, 'E'}, {"no-indirect", 0, NULL, 'I'}, {0},
	};
	int option, index = 0;

	while ((option = getopt_long(argc, argv, "", names, &index)) != -1)
		set_option(options, option, option == '?' ? "" : names[index].name, optarg);
	if (!options->socket || optind < argc)
		fail("see loadgen --help");
	if (!options->segment)
		options->segment = options->block;
	if (!options->depth || options->depth > MAX_DEPTH || !options->seed ||
	    options->seed > UINT32_MAX || !options->block || options->block % SECTOR ||
	    options->segment % SECTOR || options->block > 64 << 20 ||
	    (options->block + options->segment - 1) / options->segment > MAX_SEGMENTS - 2)
		fail("depth, block, segment or seed is out of range");
	if (options->queue_size < 4 || options->queue_size > 1024 ||
	    options->queue_size & (options->queue_size - 1))
		fail("--queue-size %u: a power of two, 4 to 1024", options->queue_size);
}

static void print_result(const struct options *options, const struct ring *ring,
			 const struct result *result)
{
	double seconds = (double)result->elapsed_ns / 1e9, cpu = (double)result->backend_ns / 1e9;
	const struct histogram *latency = &result->latency;

	printf("{\"requests\": %lu, \"seconds\": %.6f, \"backend_cpu_seconds\": %.6f, "
	       "\"own_cpu_seconds\": %.6f, \"per_second\": %.1f, \"per_cpu_second\": %.1f, "
	       "\"bytes\": %lu, \"verified\": %lu, \"learned\": %lu, \"kicks\": %lu, \"calls\": %lu, "
	       "\"latency_us\": {\"mean\": %.2f, \"p50\": %.2f, \"p99\": %.2f, \"p999\": %.2f, "
	       "\"max\": %.2f}}\n",
	       result->requests, seconds, cpu, (double)result->own_ns / 1e9,
	       (double)result->requests / seconds,
	       cpu > 0 ? (double)result->requests / cpu : 0.0, result->requests * options->block,
	       result->verified, result->learned, ring->kicks, ring->calls,
	       latency->count ? (double)latency->sum / (double)latency->count / 1e3 : 0.0,
	       (double)histogram_quantile(latency, 0.5) / 1e3,
	       (double)histogram_quantile(latency, 0.99) / 1e3,
	       (double)histogram_quantile(latency, 0.999) / 1e3, (double)latency->max / 1e3);
}

static void run(int argc, char **argv)
{
	struct options options = {
		.depth = 1, .queue_size = 128, .block = 4096, .seconds = 1.0, .readback = 4096,
		.seed = 1, .event_index = true, .indirect = true, .pin = -1,
	};
	struct guest_memory memory;
	struct ring ring = {0};
	struct result result;
	// Not all of it: older back ends know less, and refuse to tell what they don't know.
	struct virtio_blk_config config = {0};
	struct vhost vhost;
	uint64_t wanted;

	parse(&options, argc, argv);
	wanted = 1ull << VIRTIO_BLK_F_SEG_MAX | 1ull << VIRTIO_BLK_F_FLUSH |
		 (uint64_t)options.event_index << VIRTIO_RING_F_EVENT_IDX |
		 (uint64_t)options.indirect << VIRTIO_RING_F_INDIRECT_DESC;
	pin_to(options.pin);
	make_memory(&memory, RING_ADDRESS + ring_bytes(options.queue_size) +
				     options.depth * (SLOT_SPACE + options.block));
	vhost_connect(&vhost, options.socket, wanted);
	vhost_read_config(&vhost, &config, offsetof(struct virtio_blk_config, num_queues) + 2);
	ring.event_index = vhost.features >> VIRTIO_RING_F_EVENT_IDX & 1;
	ring.indirect = vhost.features >> VIRTIO_RING_F_INDIRECT_DESC & 1;
	ring.per_chain = (unsigned int)((options.block + options.segment - 1) / options.segment) + 2;
	if (vhost.features >> VIRTIO_BLK_F_SEG_MAX & 1 && ring.per_chain - 2 > config.seg_max)
		fail("--segment %lu: the disk takes %u segments", options.segment,
		     config.seg_max);
	if (options.depth * (ring.indirect ? 1 : ring.per_chain) > options.queue_size)
		fail("--queue-size %u: too small for depth %u", options.queue_size, options.depth);
	ring_init(&ring, &memory, RING_ADDRESS, options.queue_size);
	vhost_set_memory(&vhost, &memory);
	vhost_start_ring(&vhost, &memory, &ring, 0);
	load_run(&options, config.capacity, &memory, &ring, &result);
	vhost_stop_ring(&vhost, 0);
	print_result(&options, &ring, &result);
}

int main(int argc, char **argv)
{
	if (argc == 5 && !strcmp(argv[1], "prepare"))
		data_prepare(argv[2], number("BYTES", argv[3]) & ~4095ull, number("SEED", argv[4]));
	else if (argc > 2 && !strcmp(argv[1], "run"))
		run(argc - 1, argv + 1);
	else if (argc == 2 && !strcmp(argv[1], "--help"))
		fputs(usage, stdout);
	else
		fail("see loadgen --help");
	return 0;
}

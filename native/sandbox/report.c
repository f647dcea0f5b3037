#include "sandbox/sandbox.h"

#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

// What a handler may use: set once, before the process has threads.
static int report_fd = -1;
static bool report_text;

struct text {
	uint8_t bytes[160];
	size_t length;
};

static void put(struct text *text, const char *piece)
{
	while (*piece && text->length < sizeof(text->bytes))
		text->bytes[text->length++] = (uint8_t)*piece++;
}

static void put_number(struct text *text, uint64_t number)
{
	char digits[21];
	size_t at = sizeof(digits) - 1;

	digits[at] = 0;
	do {
		digits[--at] = (char)('0' + number % 10);
		number /= 10;
	} while (number);
	put(text, &digits[at]);
}

// One entry of a CBOR map: a short key and 64 bits. shared/control/codec.py reads it.
static void put_entry(struct text *text, const char *key, uint64_t number)
{
	text->bytes[text->length++] = (uint8_t)(0x60 + strlen(key));
	put(text, key);
	text->bytes[text->length++] = 0x1B;
	for (int shift = 56; shift >= 0; shift -= 8)
		text->bytes[text->length++] = (uint8_t)(number >> shift);
}

static void tell_core(int number, uint64_t call, uint64_t address)
{
	struct text text = {.length = 0};
	struct iovec vector = {.iov_base = text.bytes};
	struct msghdr message = {.msg_iov = &vector, .msg_iovlen = 1};

	put(&text, "\xA4\x64type\x64" "died");
	put_entry(&text, "signal", (uint64_t)number);
	put_entry(&text, "call", call);
	put_entry(&text, "address", address);
	vector.iov_len = text.length;
	sendmsg(report_fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
}

static void tell_user(int number, uint64_t call)
{
	struct text text = {.length = 0};

	if (number == SIGSYS) {
		put(&text, "The sandbox refused system call ");
		put_number(&text, call);
	} else {
		put(&text, "Ended by signal ");
		put_number(&text, (uint64_t)number);
	}
	put(&text, "\n");
	if (write(report_fd, text.bytes, text.length) < 0)
		return; // nobody is left to be told
}

static void die(int number, siginfo_t *info, void *context)
{
	bool refused = number == SIGSYS;
	uint64_t call = refused ? (uint64_t)info->si_syscall : 0;
	// A sender is no address.
	uint64_t address = refused || info->si_code <= 0 ? 0 : (uint64_t)(uintptr_t)info->si_addr;

	(void)context;
	if (report_text)
		tell_user(number, call);
	else
		tell_core(number, call, address);
	// Not by the signal itself: the first process of a PID namespace ignores it.
	_exit(128 + number);
}

int sv_report_deaths(int fd, bool text)
{
	static const int deadly[] = {SIGSYS, SIGABRT, SIGSEGV, SIGBUS, SIGILL, SIGFPE};
	struct sigaction action = {.sa_sigaction = die, .sa_flags = SA_SIGINFO};

	report_fd = fd;
	report_text = text;
	sigfillset(&action.sa_mask);
	for (size_t i = 0; i < sizeof(deadly) / sizeof(*deadly); i++) {
		if (sigaction(deadly[i], &action, NULL) < 0)
			return -errno;
	}
	return 0;
}

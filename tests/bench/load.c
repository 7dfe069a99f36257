/* The load generator of scripts/bench: one process, one core, epoll.
 *
 *   load deliver  opens streams, posts to each conversation, reads the replies; --cut aborts streams and resumes them
 *   load idle     holds idle streams open until its standard input ends
 *   load turns    clients that each post, wait for the stored reply, and post again; --turns: how often, else for a time,
 *                 with a new conversation after each --rotate turns; --conversation: the first 20 digits of the ids
 *   load get      requests one path repeatedly
 *   load open     requests --path, opens the stream of --conversation at --position, closes it, and does so repeatedly
 *
 * --header: a line, such as "Authorization: Bearer ...", that every request of every mode has.
 *
 * Every token of every subscriber is checked: the position in its id is the one before it plus the code points of its
 * text, and at the end all subscribers of a conversation have the same number of characters, the same bytes of text
 * and a `done`. A result is one line of JSON on standard output, which includes the number of errors.
 *
 * Bodies may be chunked or end with the connection, and the lines of a frame may come in any order, so that one program
 * measures servers of different versions. Comments and `ping` events are keep-alives, never deliveries.
 * `waited` is how long the main thread of a watched process was runnable without a core (schedstat): with a share above
 * a few per cent, the machine was too busy for a measurement.
 *
 * Latency: the wire format has no due time of a token, but the source keeps a pace: token k of a reply is due at
 * start + k * interval. The latency of a token is the time from then until it was read. `start` is chosen for each
 * conversation such that its most punctual token in the window has no latency. So latency includes every delay that a
 * user notices: in the source, in the server's queues, in the kernel's buffers. A server that falls further and further
 * behind shows in the delivered share of the due tokens, which is part of the result. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#ifndef IP_BIND_ADDRESS_NO_PORT
#define IP_BIND_ADDRESS_NO_PORT 24
#endif

enum { MAX_PIDS = 4, POSTING = 8, OPENING = 64, ID = 48, HEADER = 4096 };
static const int64_t MS = 1000000, SECOND = 1000000000;

/* ---- options, times, failures ------------------------------------------------------------------------------------ */

static struct {
    int port, conversations, subscribers, tokens, interval_us, settle_ms, window_ms, patience_ms, cut, clients, rotate,
        turns;
    bool finish;
    const char *path, *conversation, *position;
    char header[HEADER]; /* empty, or a line with its end */
    int pids[MAX_PIDS], pid_count;
} options = {.conversations = 1, .subscribers = 1, .interval_us = 20000, .settle_ms = 500, .window_ms = 1000,
             .patience_ms = 60000, .clients = 1, .rotate = 10};

static double seconds(int64_t ns) { return (double)ns / 1e9; }

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * SECOND + t.tv_nsec;
}

static void die(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    exit(2);
}

static long errors;
static char first_error[256];

static void fault(const char *format, ...) {
    if (errors++ == 0) {
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(first_error, sizeof first_error, format, arguments);
        for (char *c = first_error; *c; c++)
            if (*c == '"' || *c == '\\' || (unsigned char)*c < ' ') *c = '\'';
    }
}

/* So far, in ns: CPU time used by this process and by each watched process (all threads), and how long
 * their main threads have waited for a core. */
struct usage {
    int64_t at, own, of[MAX_PIDS], waited[MAX_PIDS];
};

static int64_t cpu_clock(clockid_t clock) {
    struct timespec t;
    if (clock_gettime(clock, &t)) die("a watched process is gone");
    return t.tv_sec * SECOND + t.tv_nsec;
}

static int64_t waited(int pid) {
    char path[64];
    long long ns = 0;
    snprintf(path, sizeof path, "/proc/%d/schedstat", pid);
    FILE *file = fopen(path, "r");
    if (!file) return 0; /* a kernel without it */
    if (fscanf(file, "%*s %lld", &ns) != 1) ns = 0;
    fclose(file);
    return ns;
}

static struct usage usage(void) {
    struct usage u = {.at = now(), .own = cpu_clock(CLOCK_PROCESS_CPUTIME_ID)};
    for (int i = 0; i < options.pid_count; i++) {
        clockid_t clock;
        if (clock_getcpuclockid(options.pids[i], &clock)) die("no process %d", options.pids[i]);
        u.of[i] = cpu_clock(clock);
        u.waited[i] = waited(options.pids[i]);
    }
    return u;
}

static void print_usage(struct usage from, struct usage to) {
    printf("\"seconds\": %.4f, \"own_cpu\": %.4f, \"cpu\": [", seconds(to.at - from.at), seconds(to.own - from.own));
    for (int i = 0; i < options.pid_count; i++)
        printf("%s%.4f", i ? ", " : "", seconds(to.of[i] - from.of[i]));
    printf("], \"waited\": [");
    for (int i = 0; i < options.pid_count; i++)
        printf("%s%.4f", i ? ", " : "", seconds(to.waited[i] - from.waited[i]));
    printf("]");
}

/* ---- samples ----------------------------------------------------------------------------------------------------- */

struct samples {
    struct sample {
        int32_t who, us;
    } *all;
    size_t count, room;
};

static void add_sample(struct samples *s, int who, int64_t us) {
    if (s->count == s->room) {
        s->room = s->room ? 2 * s->room : 65536;
        s->all = realloc(s->all, s->room * sizeof *s->all);
        if (!s->all) die("out of memory");
    }
    s->all[s->count++] = (struct sample){who, (int32_t)us};
}

static int by_us(const void *a, const void *b) {
    int32_t x = ((const struct sample *)a)->us, y = ((const struct sample *)b)->us;
    return (x > y) - (x < y);
}

static void print_samples(const char *name, struct samples *s) {
    qsort(s->all, s->count, sizeof *s->all, by_us);
    printf("\"%s\": {\"count\": %zu", name, s->count);
    const double at[] = {0.5, 0.99, 0.999, 1};
    const char *names[] = {"p50", "p99", "p999", "max"};
    for (int i = 0; i < 4 && s->count; i++) {
        size_t rank = (size_t)(at[i] * (double)s->count);
        printf(", \"%s\": %.3f", names[i], s->all[rank < s->count ? rank : s->count - 1].us / 1000.0);
    }
    printf("}");
}

/* ---- connections ------------------------------------------------------------------------------------------------- */

enum kind { STREAM, REQUEST };

struct connection {
    enum kind kind;
    int fd;
    int status; /* 0 until the head has been read */
    bool chunked, close_ends;
    long body_left; /* of a body with a length */
    enum { SIZE, DATA, END } chunk;
    long chunk_left;
    char *in; /* not yet parsed: of the head, or of the body without its chunk headers */
    size_t length, room;
};

static int poll_fd, source_addresses;

static void append(struct connection *c, const char *bytes, size_t length) {
    if (c->length + length > c->room) {
        c->room = c->length + length + 512;
        c->in = realloc(c->in, c->room);
        if (!c->in) die("out of memory");
    }
    memcpy(c->in + c->length, bytes, length);
    c->length += length;
}

static void forget(struct connection *c, size_t length) {
    c->length -= length;
    memmove(c->in, c->in + length, c->length);
}

static void send_all(struct connection *c, const char *bytes, size_t length) {
    if (send(c->fd, bytes, length, MSG_NOSIGNAL) != (ssize_t)length) fault("send: %s", strerror(errno));
}

/* Connect from one of many loopback addresses, so that ports suffice. */
static void open_connection(struct connection *c) {
    int one = 1;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (c->fd < 0) die("socket: %s", strerror(errno));
    setsockopt(c->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof one);
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    struct sockaddr_in here = {.sin_family = AF_INET}, there = {.sin_family = AF_INET};
    here.sin_addr.s_addr = htonl(0x7f000101u + (uint32_t)(source_addresses++ % 16));
    there.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    there.sin_port = htons((uint16_t)options.port);
    if (bind(c->fd, (struct sockaddr *)&here, sizeof here)) die("bind: %s", strerror(errno));
    if (connect(c->fd, (struct sockaddr *)&there, sizeof there)) die("connect: %s", strerror(errno));
    fcntl(c->fd, F_SETFL, O_NONBLOCK);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
    if (epoll_ctl(poll_fd, EPOLL_CTL_ADD, c->fd, &event)) die("epoll_ctl: %s", strerror(errno));
    c->status = 0;
    c->length = 0;
}

/* Close at once, with a reset, so that no port stays in TIME_WAIT. */
static void close_connection(struct connection *c) {
    if (c->fd < 0) return;
    struct linger abruptly = {.l_onoff = 1};
    setsockopt(c->fd, SOL_SOCKET, SO_LINGER, &abruptly, sizeof abruptly);
    close(c->fd);
    c->fd = -1;
}

/* Read a head if it is complete; return whether it is. */
static bool read_head(struct connection *c) {
    char *end = memmem(c->in, c->length, "\r\n\r\n", 4);
    if (!end) return false;
    *end = 0;
    c->status = atoi(c->in + 9);
    c->chunked = strcasestr(c->in, "\r\ntransfer-encoding: chunked");
    char *length = strcasestr(c->in, "\r\ncontent-length:");
    c->close_ends = !c->chunked && !length;
    c->body_left = length ? atol(length + 17) : 0;
    c->chunk = SIZE;
    c->chunk_left = 0;
    forget(c, (size_t)(end + 4 - c->in));
    return true;
}

/* Append bytes of a body, without its chunk headers; return false after the last chunk. */
static bool append_body(struct connection *c, const char *bytes, size_t length) {
    if (!c->chunked) {
        append(c, bytes, length);
        return true;
    }
    const char *end = bytes + length;
    while (bytes < end) {
        if (c->chunk == SIZE) {
            char digit = *bytes++;
            if (digit == '\n') {
                if (c->chunk_left == 0) return false;
                c->chunk = DATA;
            } else if (digit != '\r') {
                c->chunk_left = 16 * c->chunk_left + (digit <= '9' ? digit - '0' : (digit | 32) - 'a' + 10);
            }
        } else if (c->chunk == DATA) {
            long part = end - bytes < c->chunk_left ? end - bytes : c->chunk_left;
            append(c, bytes, (size_t)part);
            bytes += part;
            if ((c->chunk_left -= part) == 0) c->chunk = END;
        } else if (*bytes++ == '\n') {
            c->chunk = SIZE;
        }
    }
    return true;
}

/* Proceed from the head to the body, which may have arrived with it; return false if its last chunk has, too. */
static bool begin_body(struct connection *c) {
    size_t rest = c->length;
    if (!c->chunked || !rest) return true;
    char *copy = malloc(rest);
    if (!copy) die("out of memory");
    memcpy(copy, c->in, rest);
    c->length = 0;
    bool more = append_body(c, copy, rest);
    free(copy);
    return more;
}

/* ---- conversations and their streams ----------------------------------------------------------------------------- */

struct stream {
    struct connection connection; /* the first member: an epoll event points to it */
    int conversation;
    bool awake;  /* the head has come */
    bool timed;  /* its tokens are samples: it has seen the reply from its start */
    enum { NOTHING, SAYING, ENDED } phase;
    char reply[ID], last_id[ID];
    int64_t chars, said_at, cut_at;
    int tokens, keepalives, client;
    uint64_t hash;
};

static char (*conversation_ids)[25];
static struct stream *streams;
static int stream_count, opened, awake, started, ended, caught_up;
static long delivered, keepalives;
static bool recording;
static int64_t origin;
static struct samples latencies, catching_up;
static void (*on_awake)(struct stream *), (*on_token)(struct stream *, int64_t), (*on_done)(struct stream *, int64_t),
    (*on_read)(struct stream *, int64_t);

static void name_conversations(int count) {
    unsigned char random[6];
    if (getrandom(random, sizeof random, 0) != sizeof random) die("getrandom");
    conversation_ids = calloc((size_t)count, sizeof *conversation_ids);
    for (int i = 0; i < count; i++)
        snprintf(conversation_ids[i], 25, "%08lx%02x%02x%02x%02x%02x%02x%04x", (unsigned long)time(NULL), random[0],
                 random[1], random[2], random[3], random[4], (i >> 16) & 255, i & 65535);
}

static void open_stream(struct stream *s, const char *conversation) {
    char request[512 + HEADER], resume[96] = "";
    s->connection.kind = STREAM;
    s->awake = false;
    if (*s->last_id) snprintf(resume, sizeof resume, "Last-Event-ID: %s\r\n", s->last_id);
    open_connection(&s->connection);
    int length = snprintf(request, sizeof request,
                          "GET /chat/stream/%s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nAccept: text/event-stream\r\n%s%s\r\n",
                          conversation, options.port, options.header, resume);
    send_all(&s->connection, request, (size_t)length);
}

/* Count the code points of a JSON string, from its opening quote on, and hash its bytes; return its length, or -1. */
static int64_t measure(const char *text, const char *end, uint64_t *hash) {
    int64_t points = 0;
    uint64_t h = *hash;
    for (const char *c = text + 1; c < end; c++) {
        if (*c == '"') {
            *hash = h;
            return points;
        }
        h = (h ^ (unsigned char)*c) * 1099511628211u;
        if (*c == '\\') {
            h = (h ^ (unsigned char)*++c) * 1099511628211u;
            int digits = *c == 'u' ? 4 : 0;
            /* The second half of a surrogate pair is not a code point. */
            if (!digits || strncasecmp(c + 1, "dc", 2) < 0 || strncasecmp(c + 1, "df", 2) > 0) points++;
            while (digits--) h = (h ^ (unsigned char)*++c) * 1099511628211u;
        } else if ((*c & 0xc0) != 0x80) {
            points++;
        }
    }
    return -1;
}

static void take_token(struct stream *s, const char *id, const char *data, const char *end, int64_t at) {
    const char *dash = memchr(id, '-', ID);
    size_t length = dash ? (size_t)(dash - id) : 0;
    if (length != 24) {
        fault("a token without a position");
        return;
    }
    if (s->phase != SAYING || memcmp(s->reply, id, length)) {
        if (s->phase == SAYING) fault("a reply begins before %s has ended", s->reply);
        memcpy(s->reply, id, length);
        s->reply[length] = 0;
        s->phase = SAYING;
        s->chars = 0;
        s->tokens = 0;
        s->hash = 14695981039346656037u;
        started++;
    }
    const char *text = memmem(data, (size_t)(end - data), "\"text\":", 7);
    if (text) text = memchr(text + 7, '"', (size_t)(end - text - 7));
    int64_t points = text ? measure(text, end, &s->hash) : -1;
    int64_t position = atoll(dash + 1);
    if (points < 1 || s->chars + points != position)
        fault("%.24s: at %ld, then %ld characters, is called %ld", s->reply, (long)s->chars, (long)points, (long)position);
    s->chars = position;
    s->tokens++;
    delivered++;
    if (recording && s->timed)
        add_sample(&latencies, s->conversation, (at - origin) / 1000 - (int64_t)s->tokens * options.interval_us);
    if (on_token) on_token(s, at);
}

static bool is(const char *name, const char *event, size_t length) {
    return event && strlen(name) == length && !memcmp(name, event, length);
}

/* Take one block of a stream: its lines up to the blank one, in whatever order. */
static void take_event(struct stream *s, const char *block, const char *end, int64_t at) {
    const char *event = NULL, *id = NULL, *data = NULL, *data_end = NULL;
    size_t event_length = 0, id_length = 0;
    bool comment = false;
    while (block < end) {
        const char *eol = memchr(block, '\n', (size_t)(end - block));
        if (!eol) eol = end;
        if (*block == ':') {
            comment = true;
        } else if (!strncmp(block, "id: ", 4)) {
            id = block + 4;
            id_length = (size_t)(eol - id);
        } else if (!strncmp(block, "event: ", 7)) {
            event = block + 7;
            event_length = (size_t)(eol - event);
        } else if (!strncmp(block, "data: ", 6)) {
            data = block + 6;
            data_end = eol;
        }
        block = eol + 1;
    }
    if (id && id_length < ID) {
        memcpy(s->last_id, id, id_length);
        s->last_id[id_length] = 0;
    }
    if (is("ping", event, event_length) || (comment && !event && !id && !data)) {
        if (id) fault("a ping with an id: %s", s->last_id);
        s->keepalives++;
        keepalives++;
        return;
    }
    if (!data) return;
    if (!id && (is("head", event, event_length) || is("title", event, event_length))) return;
    if (!event || !id || id_length >= ID) {
        fault("an event without a name or an id");
    } else if (is("token", event, event_length)) {
        take_token(s, s->last_id, data, data_end, at);
    } else if (is("done", event, event_length)) {
        if (s->phase != SAYING || memcmp(s->reply, s->last_id, 24)) fault("a done of another reply: %s", s->last_id);
        if (options.tokens && s->timed && s->tokens != options.tokens)
            fault("a reply of %d tokens instead of %d", s->tokens, options.tokens);
        s->phase = ENDED;
        ended++;
        if (on_done) on_done(s, at);
    } else if (!is("input", event, event_length)) {
        fault("an event %.*s: %.*s", (int)event_length, event, (int)(data_end - data), data);
    }
}

static void read_stream(struct stream *s, const char *bytes, size_t length) {
    struct connection *c = &s->connection;
    int64_t at = now();
    if (!c->status) {
        append(c, bytes, length);
        if (!read_head(c)) return;
        if (c->status != 200) fault("a stream is answered by %d", c->status);
        s->awake = true;
        awake++;
        if (on_awake) on_awake(s);
        if (!begin_body(c)) fault("a stream has ended");
    } else if (!append_body(c, bytes, length)) {
        fault("a stream has ended");
    }
    char *block = c->in, *end = c->in + c->length, *blank;
    while (block < end && (blank = memmem(block, (size_t)(end - block), "\n\n", 2))) {
        take_event(s, block, blank + 1, at);
        if (!c->status) return; /* its events made the client close it and open the next one */
        block = blank + 2;
    }
    forget(c, (size_t)(block - c->in));
    if (on_read) on_read(s, at);
}

/* ---- requests ---------------------------------------------------------------------------------------------------- */

struct request {
    struct connection connection; /* the first member: an epoll event points to it */
    int client;
    bool busy;
    int64_t sent_at;
    long bytes;
};

static void (*on_answer)(struct request *, int64_t);

static void send_request(struct request *r, const char *head, const char *body) {
    char request[1024 + HEADER];
    r->connection.kind = REQUEST;
    if (r->connection.fd < 0) open_connection(&r->connection);
    int length = snprintf(request, sizeof request, "%s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n%s", head, options.port,
                          options.header);
    if (body)
        length += snprintf(request + length, sizeof request - (size_t)length,
                           "Content-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s", strlen(body), body);
    else
        length += snprintf(request + length, sizeof request - (size_t)length, "\r\n");
    r->connection.status = 0;
    r->connection.length = 0;
    r->bytes = 0;
    r->busy = true;
    r->sent_at = now();
    send_all(&r->connection, request, (size_t)length);
}

static void post(struct request *r, const char *conversation) {
    char body[128];
    snprintf(body, sizeof body, "{\"conversationId\":\"%s\",\"input\":\"Say something, please.\"}", conversation);
    send_request(r, "POST /chat", body);
}

static void answered(struct request *r) {
    r->busy = false;
    on_answer(r, now());
}

static void read_request(struct request *r, const char *bytes, size_t length) {
    struct connection *c = &r->connection;
    bool more = true;
    if (!r->busy) {
        fault("an answer to nothing");
        return;
    }
    if (!c->status) {
        append(c, bytes, length);
        if (!read_head(c)) return;
        if (c->status != 200 && c->status != 202) fault("a request is answered by %d: %.*s", c->status, (int)c->length, c->in);
        more = begin_body(c);
    } else {
        more = append_body(c, bytes, length);
    }
    r->bytes += (long)c->length;
    c->body_left -= (long)c->length;
    c->length = 0;
    if (c->chunked ? !more : !c->close_ends && c->body_left <= 0) answered(r);
}

/* ---- the loop ---------------------------------------------------------------------------------------------------- */

static void hang_up(struct connection *c) {
    bool expected = c->kind == REQUEST && ((struct request *)c)->busy && c->status && c->close_ends;
    close_connection(c);
    if (expected)
        answered((struct request *)c);
    else if (c->kind == STREAM || ((struct request *)c)->busy)
        fault("the server has closed a %s", c->kind == STREAM ? "stream" : "request");
}

static void turn_loop(int64_t until) {
    static char buffer[256 * 1024];
    static struct epoll_event events[1024];
    int64_t left = until - now();
    int milliseconds = left <= 0 ? 0 : (int)(left / MS < 20 ? (left + MS - 1) / MS : 20);
    int count = epoll_wait(poll_fd, events, 1024, milliseconds);
    for (int i = 0; i < count; i++) {
        struct connection *c = events[i].data.ptr;
        if (c->fd < 0) continue; /* closed by an earlier event of this round */
        ssize_t length = read(c->fd, buffer, sizeof buffer);
        if (length > 0) {
            if (c->kind == STREAM)
                read_stream((struct stream *)c, buffer, (size_t)length);
            else
                read_request((struct request *)c, buffer, (size_t)length);
        } else if (length == 0 || (errno != EAGAIN && errno != EINTR)) {
            hang_up(c);
        }
    }
}

static void run_for(int milliseconds) {
    int64_t until = now() + milliseconds * MS;
    while (now() < until) turn_loop(until);
}

/* Run until a count is reached; return whether it was reached in time. */
static bool run_until(const int *count, int target, const char *what) {
    int64_t until = now() + options.patience_ms * MS;
    while (*count < target && now() < until) turn_loop(until);
    if (*count < target) fault("%s: %d of %d after %d ms", what, *count, target, options.patience_ms);
    return *count >= target;
}

static void open_all(void) {
    while (opened < stream_count) {
        while (opened < stream_count && opened - awake < OPENING) {
            struct stream *s = &streams[opened++];
            open_stream(s, conversation_ids[s->conversation]);
        }
        int seen = awake;
        run_until(&awake, seen + 1, "streams open");
        if (awake == seen) return;
    }
    run_until(&awake, stream_count, "streams open");
}

static struct stream *make_streams(int conversations, int subscribers) {
    name_conversations(conversations);
    stream_count = conversations * subscribers;
    streams = calloc((size_t)stream_count, sizeof *streams);
    for (int i = 0; i < stream_count; i++) {
        streams[i].conversation = i / subscribers;
        streams[i].timed = true;
        streams[i].connection.fd = -1;
    }
    return streams;
}

/* ---- deliver ----------------------------------------------------------------------------------------------------- */

static int to_post, posted;

static void post_next(struct request *r, int64_t at) {
    (void)at;
    posted++;
    if (to_post < options.conversations) post(r, conversation_ids[to_post++]);
}

static int still_behind(const struct stream *s) {
    const struct stream *peer = &streams[s->conversation * options.subscribers + options.subscribers - 1];
    return s->chars < peer->chars;
}

static void watch_resumed(struct stream *s, int64_t at) {
    if (s->cut_at && !still_behind(s)) {
        add_sample(&catching_up, s->conversation, (at - s->cut_at) / 1000);
        s->cut_at = 0;
        caught_up++;
    }
}

/* Abort the first --cut subscribers of each conversation, all at once, and resume them from their positions. */
static void cut_and_resume(void) {
    int64_t at = now();
    for (int i = 0; i < stream_count; i++)
        if (i % options.subscribers < options.cut) {
            close_connection(&streams[i].connection);
            streams[i].timed = false;
            streams[i].cut_at = at;
        }
    int resumed = 0, before = awake;
    for (int i = 0; i < stream_count; i++)
        if (i % options.subscribers < options.cut) {
            while (resumed - (awake - before) >= OPENING) turn_loop(now() + MS);
            open_stream(&streams[i], conversation_ids[streams[i].conversation]);
            resumed++;
        }
}

static void check_ends(void) {
    for (int i = 0; i < stream_count; i++) {
        struct stream *s = &streams[i], *first = &streams[s->conversation * options.subscribers];
        if (s->phase != ENDED) fault("a stream without a done");
        if (s->chars != first->chars || s->hash != first->hash) fault("two subscribers read different replies");
    }
}

static void relate_latencies(void) {
    int32_t *start = malloc((size_t)options.conversations * sizeof *start);
    for (int i = 0; i < options.conversations; i++) start[i] = INT32_MAX;
    for (size_t i = 0; i < latencies.count; i++) {
        struct sample *s = &latencies.all[i];
        if (s->us < start[s->who]) start[s->who] = s->us;
    }
    for (size_t i = 0; i < latencies.count; i++) latencies.all[i].us -= start[latencies.all[i].who];
    free(start);
}

static void deliver(void) {
    make_streams(options.conversations, options.subscribers);
    on_token = watch_resumed;
    open_all();
    run_for(200);
    struct request *pool = calloc(POSTING, sizeof *pool);
    on_answer = post_next;
    for (int i = 0; i < POSTING; i++) pool[i].connection.fd = -1;
    for (int i = 0; i < POSTING && to_post < options.conversations; i++) post(&pool[i], conversation_ids[to_post++]);
    run_until(&posted, options.conversations, "posts answered");
    run_until(&started, stream_count, "streams with a token");
    run_for(options.settle_ms);
    recording = true;
    long delivered_before = delivered;
    struct usage from = usage();
    int cut = options.cut * options.conversations;
    if (cut) {
        run_for(500);
        cut_and_resume();
        run_for(options.window_ms - 500);
    } else {
        run_for(options.window_ms);
    }
    struct usage to = usage();
    long in_window = delivered - delivered_before;
    int over = ended;
    recording = false;
    if (options.finish && run_until(&ended, stream_count, "streams with a done")) check_ends();
    relate_latencies();
    double due = seconds(to.at - from.at) * 1e6 / options.interval_us * stream_count;
    printf("{\"delivered\": %ld, \"rate\": %.1f, \"share\": %.4f, \"ended_early\": %d, ", in_window,
           (double)in_window / seconds(to.at - from.at), (double)in_window / due, over);
    if (cut) {
        if (caught_up < cut) fault("only %d of %d caught up", caught_up, cut);
        print_samples("caught_up_ms", &catching_up);
        printf(", ");
    }
    print_samples("latency_ms", &latencies);
    printf(", ");
    print_usage(from, to);
}

/* ---- idle -------------------------------------------------------------------------------------------------------- */

static void idle(void) {
    make_streams(options.conversations, options.subscribers);
    struct usage from = usage();
    open_all();
    struct usage to = usage();
    printf("{\"connected\": %d, \"errors\": %ld, ", awake, errors);
    print_usage(from, to);
    printf("}\n");
    fflush(stdout);
    struct epoll_event event = {.events = EPOLLIN};
    struct request input = {.connection = {.kind = REQUEST, .fd = STDIN_FILENO}};
    event.data.ptr = &input;
    if (epoll_ctl(poll_fd, EPOLL_CTL_ADD, STDIN_FILENO, &event)) die("standard input is no pipe");
    run_for(200); /* do not count the first frames of a stream as keep-alives */
    keepalives = 0;
    for (int i = 0; i < stream_count; i++) streams[i].keepalives = 0;
    from = usage();
    while (input.connection.fd >= 0) turn_loop(now() + 20 * MS);
    to = usage();
    int least = stream_count ? streams[0].keepalives : 0;
    for (int i = 0; i < stream_count; i++)
        if (streams[i].keepalives < least) least = streams[i].keepalives;
    printf("{\"keepalives\": %ld, \"least\": %d, ", keepalives, least);
    print_usage(from, to);
}

/* ---- turns ------------------------------------------------------------------------------------------------------- */

struct client {
    struct stream *stream;
    struct request *request;
    bool done, answered, first;
    int turns;
    int64_t posted_at;
};

static struct client *clients;
static struct samples first_tokens, whole_turns;
static int running_turns, idle_clients;
static long turns;
static bool ending;

static void say_next(struct client *c) {
    struct stream *s = c->stream;
    if (ending || (options.turns && c->turns == options.turns)) {
        idle_clients++;
        return;
    }
    if (!options.turns && c->turns == options.rotate) {
        /* The next conversation: another stream, and the post once it is open. */
        static int fresh;
        close_connection(&s->connection);
        snprintf(conversation_ids[s->conversation], 25, "%08lx%08x%08x", (unsigned long)time(NULL), getpid(), ++fresh);
        s->phase = NOTHING;
        *s->last_id = 0;
        c->turns = 0;
        open_stream(s, conversation_ids[s->conversation]);
        return;
    }
    c->done = c->answered = c->first = false;
    c->turns++;
    running_turns++;
    c->posted_at = now();
    post(c->request, conversation_ids[s->conversation]);
}

static void end_turn(struct client *c) {
    if (!c->done || !c->answered) return;
    running_turns--;
    say_next(c);
}

static void stream_awake(struct stream *s) { say_next(&clients[s->client]); }

static void first_token(struct stream *s, int64_t at) {
    struct client *c = &clients[s->client];
    if (!c->first && recording) add_sample(&first_tokens, s->client, (at - c->posted_at) / 1000);
    c->first = true;
}

static void turn_done(struct stream *s, int64_t at) {
    struct client *c = &clients[s->client];
    if (recording) {
        turns++;
        add_sample(&whole_turns, s->client, (at - c->posted_at) / 1000);
    }
    c->done = true;
    end_turn(c);
}

static void turn_answered(struct request *r, int64_t at) {
    (void)at;
    clients[r->client].answered = true;
    end_turn(&clients[r->client]);
}

static void take_turns(void) {
    make_streams(options.clients, 1);
    clients = calloc((size_t)options.clients, sizeof *clients);
    struct request *requests = calloc((size_t)options.clients, sizeof *requests);
    for (int i = 0; i < options.clients; i++) {
        requests[i].connection.fd = -1;
        requests[i].client = streams[i].client = i;
        clients[i] = (struct client){.stream = &streams[i], .request = &requests[i]};
        if (options.conversation) snprintf(conversation_ids[i], 25, "%.20s%04x", options.conversation, i & 0xffff);
    }
    on_awake = stream_awake;
    on_token = first_token;
    on_done = turn_done;
    on_answer = turn_answered;
    recording = options.turns;
    struct usage from = usage();
    open_all();
    if (options.turns) {
        run_until(&idle_clients, options.clients, "clients at the end of their last turn");
    } else {
        run_for(options.settle_ms);
        recording = true;
        from = usage();
        run_for(options.window_ms);
    }
    struct usage to = usage();
    recording = false;
    ending = true;
    run_until(&idle_clients, options.clients, "clients at the end of their turn");
    printf("{\"turns\": %ld, \"rate\": %.2f, ", turns, (double)turns / seconds(to.at - from.at));
    print_samples("first_token_ms", &first_tokens);
    printf(", ");
    print_samples("turn_ms", &whole_turns);
    printf(", ");
    print_usage(from, to);
}

/* ---- get --------------------------------------------------------------------------------------------------------- */

static struct samples answers;
static long answer_bytes;
static int idle_requests;

/* Request --path, unless the measurement has ended. */
static void request_path(struct request *r) {
    char head[512];
    if (ending) {
        idle_requests++;
        return;
    }
    snprintf(head, sizeof head, "GET %s", options.path);
    send_request(r, head, NULL);
}

/* Measure requests that repeat themselves, end them, and print the results. */
static void measure_requests(int count) {
    run_for(options.settle_ms);
    recording = true;
    struct usage from = usage();
    run_for(options.window_ms);
    struct usage to = usage();
    recording = false;
    ending = true;
    run_until(&idle_requests, count, "requests end");
    printf("{\"bytes\": %ld, ", answer_bytes);
    print_samples("answer_ms", &answers);
    printf(", ");
    print_usage(from, to);
}

static void ask_again(struct request *r, int64_t at) {
    if (recording) {
        add_sample(&answers, r->client, (at - r->sent_at) / 1000);
        answer_bytes = r->bytes;
    }
    request_path(r);
}

static void get(void) {
    struct request *requests = calloc((size_t)options.clients, sizeof *requests);
    on_answer = ask_again;
    for (int i = 0; i < options.clients; i++) {
        requests[i].connection.fd = -1;
        requests[i].client = i;
        request_path(&requests[i]);
    }
    measure_requests(options.clients);
}

/* ---- open -------------------------------------------------------------------------------------------------------- */

static struct request history;

static void open_its_stream(struct request *r, int64_t at) {
    (void)at;
    answer_bytes = r->bytes;
    snprintf(streams->last_id, ID, "%s", options.position);
    streams->keepalives = 0;
    open_stream(streams, options.conversation);
}

/* The first ping is part of the opening of a stream. */
static void end_opening(struct stream *s, int64_t at) {
    if (!s->keepalives) return;
    if (recording) add_sample(&answers, 0, (at - history.sent_at) / 1000);
    close_connection(&s->connection);
    request_path(&history);
}

static void open_repeatedly(void) {
    if (!options.path || !options.conversation || !options.position)
        die("open: --path, --conversation or --position is missing");
    make_streams(1, 1);
    history.connection.fd = -1;
    on_answer = open_its_stream;
    on_read = end_opening;
    request_path(&history);
    measure_requests(1);
}

/* ---- main -------------------------------------------------------------------------------------------------------- */

static const struct {
    const char *name;
    int *value;
} numbers[] = {
    {"--port", &options.port},           {"--conversations", &options.conversations},
    {"--tokens", &options.tokens},       {"--subscribers", &options.subscribers},
    {"--window-ms", &options.window_ms}, {"--interval-us", &options.interval_us},
    {"--cut", &options.cut},             {"--settle-ms", &options.settle_ms},
    {"--clients", &options.clients},     {"--patience-ms", &options.patience_ms},
    {"--rotate", &options.rotate},       {"--turns", &options.turns},
};

static void read_options(int argc, char **argv) {
    for (int i = 2; i < argc; i++) {
        bool known = false;
        if (!strcmp(argv[i], "--finish")) {
            options.finish = true;
            continue;
        }
        if (i + 1 == argc) die("%s: no value", argv[i]);
        for (size_t k = 0; k < sizeof numbers / sizeof *numbers; k++)
            if (!strcmp(argv[i], numbers[k].name)) {
                *numbers[k].value = atoi(argv[i + 1]);
                known = true;
            }
        if (!strcmp(argv[i], "--path")) options.path = argv[i + 1], known = true;
        if (!strcmp(argv[i], "--conversation")) options.conversation = argv[i + 1], known = true;
        if (!strcmp(argv[i], "--position")) options.position = argv[i + 1], known = true;
        if (!strcmp(argv[i], "--header")) {
            if (snprintf(options.header, HEADER, "%s\r\n", argv[i + 1]) >= HEADER) die("--header: too long");
            known = true;
        }
        if (!strcmp(argv[i], "--pid") && options.pid_count < MAX_PIDS)
            options.pids[options.pid_count++] = atoi(argv[i + 1]), known = true;
        if (!known) die("%s: unknown", argv[i]);
        i++;
    }
}

int main(int argc, char **argv) {
    struct rlimit files;
    if (argc < 2) die("usage: load deliver|idle|turns|get|open --port N ...");
    read_options(argc, argv);
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    poll_fd = epoll_create1(EPOLL_CLOEXEC);
    origin = now();
    if (!strcmp(argv[1], "deliver"))
        deliver();
    else if (!strcmp(argv[1], "idle"))
        idle();
    else if (!strcmp(argv[1], "turns"))
        take_turns();
    else if (!strcmp(argv[1], "get"))
        get();
    else if (!strcmp(argv[1], "open"))
        open_repeatedly();
    else
        die("%s: unknown", argv[1]);
    printf(", \"errors\": %ld, \"first_error\": \"%s\"}\n", errors, first_error);
    for (int i = 0; i < stream_count; i++) close_connection(&streams[i].connection);
    return 0;
}

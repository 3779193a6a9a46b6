/* Threads that share a step. Rows, tokens and heads are not dealt out beforehand: a thread begins with its own part, takes
   a few at a time, and then takes from the others' parts. So one that is slow, or that had to give its processor to
   another program, holds up the others by what it has in hand and no more.

   Why not OpenMP's: libgomp spins at every barrier and between two steps, on a processor that the service may need; where
   the program has more threads than processors, it sleeps at every barrier at once, 30 microseconds each. Here one who
   waits spins as long as waking up would take, and then sleeps, which lets the system move a thread that was pushed aside
   to the free processor. */

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>
#ifdef __linux__
#include <sys/prctl.h>
#endif

#define SPIN_NANOSECONDS 100000
#define PARTS 4 /* pieces that a thread's part is taken in: fewer make the end uneven, more cost a nanosecond each */

typedef struct {
    _Alignas(64) atomic_long taken;
} Part;

typedef struct Team {
    int threads;
    int leaves;                        /* the helpers end */
    void (*work)(void *, struct Team *, int); /* what the threads do between two meetings, the caller as number 0 */
    void *argument;
    Part *parts;
    pthread_t *helpers;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    _Alignas(64) atomic_int arrived;
    _Alignas(64) atomic_uint meetings;
    atomic_int sleepers;
} Team;

INLINE void relax(void) {
#ifdef __x86_64__
    _mm_pause();
#endif
}

static int64_t nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static void wait_for_others(Team *team, unsigned meeting) {
    for (int64_t start = nanoseconds(); nanoseconds() - start < SPIN_NANOSECONDS;)
        for (int i = 0; i < 16; i++) {
            if (atomic_load_explicit(&team->meetings, memory_order_acquire) != meeting) return;
            relax();
        }
    pthread_mutex_lock(&team->lock);
    atomic_fetch_add(&team->sleepers, 1); /* before the look at `meetings`: the last one looks the other way round */
    while (atomic_load(&team->meetings) == meeting) pthread_cond_wait(&team->changed, &team->lock);
    atomic_fetch_sub(&team->sleepers, 1);
    pthread_mutex_unlock(&team->lock);
}

/* Wait until all threads are here; afterwards nothing is taken. */
static void meet(Team *team) {
    unsigned meeting = atomic_load_explicit(&team->meetings, memory_order_relaxed);
    if (atomic_fetch_add(&team->arrived, 1) < team->threads - 1) {
        wait_for_others(team, meeting);
        return;
    }
    atomic_store_explicit(&team->arrived, 0, memory_order_relaxed);
    for (int i = 0; i < team->threads; i++) atomic_store_explicit(&team->parts[i].taken, 0, memory_order_relaxed);
    atomic_store(&team->meetings, meeting + 1);
    if (atomic_load(&team->sleepers)) {
        pthread_mutex_lock(&team->lock);
        pthread_cond_broadcast(&team->changed);
        pthread_mutex_unlock(&team->lock);
    }
}

/* Items `from` to `to` - 1 of `count`, which a thread has taken; see `take`. */
typedef struct {
    int64_t count, piece, from, to;
    int thread, robbed;
} Taken;

/* For a loop over items between two meetings, in pieces of at least `least` items. */
static Taken share(const Team *team, int thread, int64_t count, int64_t least) {
    int64_t piece = team->threads == 1 ? count : count / (team->threads * PARTS);
    return (Taken){count, piece > least ? piece : least, 0, 0, thread, 0};
}

/* The thread's next items, 0 if there are none left. */
static int take(Team *team, Taken *t) {
    for (; t->robbed < team->threads; t->robbed++) {
        int whose = (t->thread + t->robbed) % team->threads;
        int64_t first = t->count * whose / team->threads, end = t->count * (whose + 1) / team->threads;
        atomic_long *taken = &team->parts[whose].taken;
        if (atomic_load_explicit(taken, memory_order_relaxed) >= end - first) continue;
        t->from = first + atomic_fetch_add_explicit(taken, t->piece, memory_order_relaxed);
        t->to = MIN(t->from + t->piece, end);
        if (t->from < end) return 1;
    }
    return 0;
}

typedef struct {
    Team *team;
    int thread;
} Helper;

static void *help(void *given) {
    Helper helper = *(Helper *)given;
    free(given);
#ifdef __linux__
    prctl(PR_SET_NAME, "soma-step");
#endif
    for (;;) {
        meet(helper.team);
        if (helper.team->leaves) return 0;
        helper.team->work(helper.team->argument, helper.team, helper.thread);
        meet(helper.team);
    }
}

/* Run `work` on all threads. */
static void together(Team *team, void (*work)(void *, Team *, int), void *argument) {
    team->work = work, team->argument = argument;
    meet(team);
    work(argument, team, 0);
    meet(team);
}

/* End a team's helpers, and free it. Not from a process that was forked since it was made: it has no helpers. */
void soma_disband(Team *team) {
    team->leaves = 1;
    if (team->threads > 1) meet(team);
    for (int i = 1; i < team->threads; i++) pthread_join(team->helpers[i], 0);
    pthread_mutex_destroy(&team->lock);
    pthread_cond_destroy(&team->changed);
    free(team->parts);
    free(team->helpers);
    free(team);
}

/* A team of the calling thread, whichever calls, and helpers, fewer than asked for if the system gives no more. NULL
   without memory. Signals are left to the program's own threads. */
Team *soma_assemble(int threads) {
    Team *team = aligned_alloc(64, ROUND_UP(sizeof(Team), 64));
    if (!team) return 0;
    memset(team, 0, sizeof *team);
    team->threads = threads;
    team->parts = aligned_alloc(64, sizeof(Part) * (size_t)threads);
    team->helpers = malloc(sizeof(pthread_t) * (size_t)threads);
    if (!team->parts || !team->helpers) {
        free(team->parts), free(team->helpers), free(team);
        return 0;
    }
    for (int i = 0; i < threads; i++) atomic_init(&team->parts[i].taken, 0);
    pthread_mutex_init(&team->lock, 0);
    pthread_cond_init(&team->changed, 0);
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (int i = 1; i < threads; i++) {
        Helper *helper = malloc(sizeof *helper);
        if (helper) *helper = (Helper){team, i};
        if (!helper || pthread_create(&team->helpers[i], 0, help, helper)) {
            free(helper);
            team->threads = i; /* those that are there wait for more than themselves either way */
            break;
        }
    }
    pthread_sigmask(SIG_SETMASK, &before, 0);
    return team;
}
